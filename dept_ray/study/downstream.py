"""What a body is worth to a task with labels: a run's model, fine-tuned (METHOD.md section 4), and how well it answers.

The same is done once more from a body that was drawn and never trained, with the same embedding, so that a figure says
what the *body* brought. The run itself is not changed.

    <end> part <end> part <end>      a text as the model reads it; one too long is cut at the end of its longest part
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.draws import seed_for
from dept_ray.errors import ConfigError
from dept_ray.silo.hardware import choose_hardware, threads_for
from dept_ray.silo.model import Body, LanguageModel, initialise
from dept_ray.silo.silo import Silo
from dept_ray.study.choose import choose_for
from dept_ray.study.examples import Example, Task, load_examples, task_named
from dept_ray.study.generate import trained_silo
from dept_ray.study.tuned import METRICS, Encoded, FineTuned, Settings

Tell = Callable[[str, int, int], None]
"""Called with (which body, step, of all)."""


def downstream(
    job: Job, folder: Path, task_name: str, source: str | None = None, train: str | None = None,
    validation: str | None = None, settings: Settings | None = None, baseline: bool = True,
    tell: Tell = lambda which, step, of: None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune the model of a run's last committed round on a task.

    Args:
        job, folder: the run.
        task_name: a key of `TASKS`.
        source: whose tokenizer and embedding to use; None: the one that the task's text is most like.
        train, validation: parquet or jsonl files of the task's columns, both or none; None: from the Hub.
        settings: None: the paper's.
        baseline: also from a body that nobody trained.
        tell: hears how far it is.

    Returns:
        Plain values: task, run, round, source, settings, examples, `left_out` (share of the text's tokens that a
        trimmed vocabulary has no row for), metric, chance, and `bodies`: by body the metric and the mean loss of the
        last epoch.

    Raises:
        ConfigError: there is no such task or source, a number is out of range, or one file is named and not the other.
        SourceError: the examples cannot be had.
        StoreError, ShardError: no round is committed, or something of the run is missing.
    """
    task, settings = task_named(task_name), settings or Settings()
    if (train is None) != (validation is None):
        raise ConfigError(f"train = {train!r} and validation = {validation!r}: name both files, or none")
    examples = load_examples(task, "train", train, settings.most)
    held_out = load_examples(task, task.validation, validation, settings.most)
    outputs = _outputs(task, examples, held_out)
    source = source or choose_for(job, folder, _some_text(examples)).source
    state, silo = trained_silo(job, folder, source)
    encode = _Encoder(silo, source, settings.context)
    learn, test = encode(examples), encode(held_out)
    hardware = choose_hardware(silo.job, threads_for(silo.job, 1), torch.cuda.is_available(), compile=False)
    torch.set_num_threads(hardware.threads)
    bodies = {"trained": silo.model} | ({"random": _with_random_body(silo, settings.seed)} if baseline else {})
    figures: dict[str, dict[str, float | None]] = {}
    for which, model in bodies.items():
        tuned = FineTuned(silo.job, copy.deepcopy(model), outputs, settings, task.goal, hardware, encode.end)
        loss = tuned.fit(learn, lambda step, of, which=which: tell(which, step, of))
        figures[which] = {METRICS[task.goal].name: tuned.measure(test), "loss": loss}
    return {
        "task": task_name, "run": job.name, "round": state.round, "source": source, "settings": asdict(settings),
        "train": train or task.dataset, "validation": validation or task.dataset,
        "examples": {"train": len(examples), "validation": len(held_out)}, "left_out": encode.left_out,
        "metric": METRICS[task.goal].name, "chance": METRICS[task.goal].chance(test.labels), "bodies": figures,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is read
def _outputs(task: Task, train: Sequence[Example], validation: Sequence[Example]) -> int:
    """Of the head, for one sequence."""
    if task.goal != "class":
        return 1
    classes = int(max(example.label for example in train)) + 1
    unknown = {int(example.label) for example in validation if example.label >= classes}
    if unknown or classes < 2:
        raise ConfigError(
            f"{task.label}: {classes} classes to train on, {sorted(unknown)} beside them to measure: name files in "
            "which the training examples have every class, two at least"
        )
    return classes


def _some_text(examples: Sequence[Example]) -> str:
    return "\n".join(text for example in examples[:200] for text in example.sequences[0])


class _Encoder:
    """Texts as rows of one silo's vocabulary; counts what has none."""

    def __init__(self, silo: Silo, source: str, context: int | None) -> None:
        corpus, self._vocabulary = silo.corpora[source], silo.vocabulary
        self._tokenizer, self._end = corpus.tokenizer, corpus.end_of_text
        self.end = int(self._vocabulary.to_local(np.array([self._end]))[0])
        self._context = context or silo.job.inner.context
        if self._context > silo.job.positions and silo.job.model.arch == "gpt2":
            raise ConfigError(f"context = {context}: the model has {silo.job.positions} positions; lower it")
        self._seen = self._missing = 0

    @property
    def left_out(self) -> float:
        """Share of all tokens so far."""
        return self._missing / max(1, self._seen)

    def __call__(self, examples: Sequence[Example]) -> Encoded:
        texts = sorted({text for example in examples for sequence in example.sequences for text in sequence})
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = {text: self._rows(np.array(each.ids, np.int64)) for text, each in zip(texts, encoded, strict=True)}
        sequences = [
            tuple(self._joined([rows[text] for text in sequence]) for sequence in example.sequences)
            for example in examples
        ]
        return Encoded(sequences, np.array([example.label for example in examples], np.float64))

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        owned = np.isin(ids, self._vocabulary.ids) if self._vocabulary.ids is not None else np.ones(len(ids), bool)
        self._seen, self._missing = self._seen + len(ids), self._missing + int((~owned).sum())
        return self._vocabulary.to_local(ids[owned]).astype(np.int64)

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        room = self._context - len(parts) - 1
        if room < len(parts):
            raise ConfigError(f"context = {self._context} holds no text of {len(parts)} parts; raise it")
        lengths = [len(part) for part in parts]
        while sum(lengths) > room:
            longest = lengths.index(max(lengths))
            others = max([length for i, length in enumerate(lengths) if i != longest], default=0)
            lengths[longest] = max(min(lengths[longest] - 1, others), lengths[longest] - (sum(lengths) - room))
        end = np.array([self.end], np.int64)
        cut = [end, *(np.concatenate([part[:n], end]) for part, n in zip(parts, lengths, strict=True))]
        return np.concatenate(cut)


def _with_random_body(silo: Silo, seed: int) -> LanguageModel:
    body = Body(silo.job.model)
    initialise(body, torch.Generator().manual_seed(seed_for(seed, "downstream", "body")))
    return LanguageModel(body, silo.model.embedding)
