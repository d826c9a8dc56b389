"""A model with a head, fine-tuned: the loop over batches, and what is measured at its end.

Everything is trained, by the AdamW of `silo.optimizer`, at a rate that falls linearly to nothing (METHOD.md section 4).
The head is one matrix and reads the final hidden state of a text's last token. Knows nothing of texts and runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dept_ray.config import Job
from dept_ray.draws import generator, seed_for
from dept_ray.errors import ConfigError
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.inner import make_optimizer
from dept_ray.silo.model import STD, LanguageModel, flatten_gradients, flatten_parameters, layout_of
from dept_ray.silo.optimizer import AdamW, Group
from dept_ray.study.examples import Goal

TOKENS_AT_ONCE = 16_384
"""Of a forward pass; gradients of a batch accumulate."""


@dataclass(frozen=True)
class Settings:
    """How it is fine-tuned: the paper's, but for what it does not say (epochs, clipping).

    Raises:
        ConfigError: a number out of range.
    """

    epochs: int = 3
    batch_size: int = 128
    lr: float = 3e-5
    """Of the first step; it falls linearly to nothing."""
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    context: int | None = None
    """Tokens read of a text at most; None: the run's `inner.context`."""
    most: int | None = None
    """Examples of each split; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "lr", "clip", "context", "most"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"{key} = {value}: must be above 0")


@dataclass(frozen=True)
class Encoded:
    """Examples as a model reads them: C sequences each."""

    sequences: list[tuple[np.ndarray, ...]]
    """Rows of the vocabulary, (t,) int64 each."""
    labels: np.ndarray
    """(N,) fp64."""


@dataclass(frozen=True)
class Metric:
    """What a goal is trained for, and measured by."""

    name: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Logits (N, outputs) and labels (N,) -> their sum."""
    of: Callable[[np.ndarray, np.ndarray], float | None]
    """Logits (N, outputs) and labels (N,)."""
    chance: Callable[[np.ndarray], float]
    """What one constant answer would be worth at best."""
    numbers: bool = False
    """Whether labels are numbers, of which the head, that begins at 0, learns the deviations from their mean."""


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers.

    >>> accuracy(np.array([[0.1, 0.9], [2.0, 1.0]]), np.array([1, 1]))
    0.5
    """
    return float((logits.argmax(1) == labels).mean())


def pearson(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Pearson's correlation of the first output; None where one of the two is constant.

    >>> pearson(np.array([[1.0], [2.0], [3.0]]), np.array([2.0, 4.0, 6.0]))
    1.0
    >>> pearson(np.array([[1.0], [1.0]]), np.array([2.0, 4.0]))
    """
    a, b = logits[:, 0] - logits[:, 0].mean(), labels - labels.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return round(float(a @ b) / size, 12) if size else None


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels.long(), reduction="sum")


def _commonest(labels: np.ndarray) -> float:
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


_RIGHT = Metric("accuracy", _cross_entropy, accuracy, _commonest)
METRICS: dict[Goal, Metric] = {
    "class": _RIGHT,
    "choice": _RIGHT,
    "number": Metric("pearson", lambda logits, labels: ((logits[:, 0].float() - labels) ** 2).sum(), pearson,
                     lambda labels: 0.0, numbers=True),
}  # fmt: skip


class FineTuned:
    """A model with a head, on its way from the one to the other."""

    def __init__(
        self, job: Job, model: LanguageModel, outputs: int, settings: Settings, goal: Goal, hardware: Hardware, end: int
    ) -> None:
        self._settings, self._metric, self._hardware, self._end = settings, METRICS[goal], hardware, end
        self._at_once = max(1, TOKENS_AT_ONCE // (settings.context or job.inner.context))
        self._model = model.to(hardware.device)
        self._head = nn.Linear(job.model.width, outputs)
        with torch.no_grad():
            draws = torch.Generator().manual_seed(seed_for(settings.seed, "downstream", "head"))
            self._head.weight.normal_(0, STD, generator=draws)
            self._head.bias.zero_()
        self._head = self._head.to(hardware.device)
        layout = layout_of(job.model)  # pyright: ignore[reportArgumentType] - a frozen section has a hash
        flat = flatten_parameters(model.body, layout)
        gradient = flatten_gradients(model.body, layout)
        inner = job.inner.model_copy(update={"optimizer": "adamw", "weight_decay": 0.0})
        groups = make_optimizer(job.model_copy(update={"inner": inner}), flat, layout, gradient, model.embedding).groups
        groups += [Group(f"head.{name}", parameter, 0.0) for name, parameter in self._head.named_parameters()]
        self._optimizer = AdamW(groups, settings.betas, inner.eps)
        self._scale = (0.0, 1.0)

    def fit(self, examples: Encoded, tell: Callable[[int, int], None]) -> float:
        """Train; the mean loss of the last epoch."""
        settings, n = self._settings, len(examples.labels)
        if self._metric.numbers:
            self._scale = float(examples.labels.mean()), float(examples.labels.std()) or 1.0
        each = math.ceil(n / settings.batch_size)
        losses = list[float]()
        self._model.train()
        for step in range(settings.epochs * each):
            epoch, batch = divmod(step, each)
            order = generator(settings.seed, "downstream", epoch).permutation(n)
            chosen = order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            losses.append(self._step(examples, chosen, settings.lr * (1 - step / (settings.epochs * each))))
            tell(step + 1, settings.epochs * each)
        return sum(losses[-each:]) / n

    def _step(self, examples: Encoded, chosen: np.ndarray, lr: float) -> float:
        """One update; the sum of the losses before it."""
        total = 0.0
        mean, spread = self._scale
        for group in self._optimizer.groups:
            group.lr = lr
        for some in self._pieces(chosen, examples):
            labels = torch.from_numpy((examples.labels[some] - mean) / spread).float().to(self._hardware.device)
            loss = self._metric.loss(self._logits([examples.sequences[i] for i in some]), labels)
            (loss / len(chosen)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._optimizer.tensors, self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    @torch.no_grad()
    def measure(self, examples: Encoded) -> float | None:
        """The metric, with the parameters as they are."""
        self._model.eval()
        pieces = self._pieces(np.arange(len(examples.labels)), examples)
        logits = [self._logits([examples.sequences[i] for i in some]).float().cpu().numpy() for some in pieces]
        return self._metric.of(np.concatenate(logits).astype(np.float64), examples.labels)

    def _pieces(self, chosen: np.ndarray, examples: Encoded) -> list[np.ndarray]:
        at_once = max(1, self._at_once // len(examples.sequences[0]))
        return [chosen[start : start + at_once] for start in range(0, len(chosen), at_once)]

    def _logits(self, examples: Sequence[tuple[np.ndarray, ...]]) -> torch.Tensor:
        """(N, outputs) of one sequence each, (N, C) of C sequences with one output each."""
        sequences = [sequence for example in examples for sequence in example]
        lengths = np.array([len(sequence) for sequence in sequences])
        ids = np.full((len(sequences), lengths.max()), self._end, np.int64)  # what stands behind is not looked at
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        device = self._hardware.device
        with torch.autocast(self._hardware.device_type, torch.bfloat16, enabled=self._hardware.autocast):
            x = self._model.body(self._model.embedding(torch.from_numpy(ids).to(device)))
            last = x[torch.arange(len(ids), device=device), torch.from_numpy(lengths - 1).to(device)]
            return self._head(last).view(len(examples), -1)
