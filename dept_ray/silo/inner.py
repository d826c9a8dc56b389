"""N optimizer steps on one source: the part of Algorithm 1 that runs inside a silo.

One step is: accumulate micro-batches, sum over the silo's ranks, clip, AdamW or Muon, next. Nothing in it waits for the
device: losses stay there and are read once at the end (and a few times a minute for whoever watches). The learning rate
is a function of the *global* step, so a silo that skipped rounds or joined late stands where all others stand.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.model import Embedding, LanguageModel, Layout
from dept_ray.silo.norms import Norms
from dept_ray.silo.optimizer import AdamW, Group, Muon, Optimizer
from dept_ray.silo.parts import clip_gradients, share_parameters, sum_gradients
from dept_ray.silo.team import ALONE, Team

_WATCH_EVERY_S = 1.0


def cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then a cosine to `floor * peak` (METHOD.md section 2).

    >>> [round(cosine(s, steps=12, warmup=2, peak=1.0, floor=0.1), 3) for s in (0, 1, 2, 7, 11)]
    [0.5, 1.0, 1.0, 0.55, 0.122]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(
    job: Job, body: torch.Tensor, layout: Layout, body_grad: torch.Tensor | None, embedding: Embedding
) -> Optimizer:
    """Over the flat body (matrices, then vectors), the tokens and the positions; decay on matrices only."""

    def part(start: int, stop: int) -> torch.Tensor:
        tensor = body[start:stop].detach()
        tensor.grad = None if body_grad is None else body_grad[start:stop]
        return tensor

    matrices = Group("matrices", part(0, layout.matrix_size), job.inner.weight_decay)
    groups = [
        Group("vectors", part(layout.matrix_size, layout.size), 0.0),
        Group("tokens", embedding.tokens, 0.0),
    ]
    if embedding.positions is not None:
        groups.append(Group("positions", embedding.positions, 0.0))
    if job.inner.optimizer == "adamw":
        return AdamW([matrices, *groups], job.inner.betas, job.inner.eps)
    shapes = [shape for shape in layout.shapes if len(shape) > 1]
    return Muon(matrices, shapes, AdamW(groups, job.inner.betas, job.inner.eps))


@dataclass(frozen=True)
class Trained:
    """What the inner steps of a round did, so far."""

    steps: int = 0
    tokens: int = 0
    losses: tuple[float, ...] = ()
    """Mean cross-entropy of each step, nats per token."""
    norms: dict[str, list[float]] = field(default_factory=dict)
    """As `silo.norms` reads them; empty where they are not measured."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the steps, nats per token; nan without a step."""
        return torch.tensor(self.losses, dtype=torch.float64).mean().item() if self.steps else math.nan


NOTHING = Trained()
"""What a round begins with."""


@dataclass(frozen=True)
class Schedule:
    """Which learning rate each parameter group has at each step of a round: a function of the *global* step."""

    first_step: int
    """Global step of the round's first batch."""
    steps: int
    """Batches of the round."""
    total_steps: int
    """Length of the one cosine."""
    peak: float
    warmup: int
    floor: float
    """As a fraction of the peak."""
    embedding_period: int | None = None
    """Steps of the token embedding's own cosine, which begins with the round (ACT); None: the one of all."""
    frozen_steps: int = 0
    """First steps of the round in which the body stands still."""

    def rate(self, group: str, done: int) -> float:
        """Of a group (matrices, vectors, tokens, positions) after `done` steps of the round."""
        if group in ("matrices", "vectors") and done < self.frozen_steps:
            return 0.0
        if group == "tokens" and self.embedding_period is not None:
            period = self.embedding_period
            warmup = min(self.warmup, period // 10)
            return cosine(done, steps=period, warmup=warmup, peak=self.peak, floor=self.floor)
        step = self.first_step + done
        return cosine(step, steps=self.total_steps, warmup=self.warmup, peak=self.peak, floor=self.floor)


def train_steps(
    model: LanguageModel,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: Optimizer,
    batches: Iterable[np.ndarray],
    *,
    job: Job,
    hardware: Hardware,
    schedule: Schedule,
    should_stop: Callable[[], bool],
    watch: Callable[[int, float, float], None],
    team: Team = ALONE,
    made: Trained = NOTHING,
) -> Trained:
    """Train on batches until they end or one is asked to stop.

    Args:
        model: whose parameters `optimizer` steps.
        loss_of: (B, T) ids and targets -> summed nats; `model.loss` or its compiled twin.
        batches: (B, T + 1) local ids each.
        schedule: learning rates, and how many batches the round has.
        should_stop: asked between steps, so that one step at least is made; all ranks must hear the same.
        watch: called about once a second with (steps done, recent mean loss on this rank's rows, tokens/s).
        team: who trains on the same batches, each on its own rows of them.
        made: what was trained of the round before; a round in pieces has the bits of one that was trained at once.

    Returns:
        How far the round came; gradients are left as the last step had them.
    """
    inner = job.inner
    losses = torch.zeros(max(schedule.steps, 1), device=hardware.device)
    losses[: made.steps] = torch.tensor(made.losses)
    done, began, watched = made.steps, time.perf_counter(), time.perf_counter()
    tokens_per_step = inner.batch_size * inner.context
    norms = Norms(inner.norms_every, schedule.first_step)  # on all ranks, where none has the whole model
    model.train()
    for batch in batches:
        if done and should_stop():  # who is asked to hand in what it has should have something
            break
        optimizer.zero_grad()
        for group in optimizer.groups:
            group.lr = schedule.rate(group.kind, done)
        ids = torch.from_numpy(team.rows(batch).astype(np.int64))
        if hardware.device_type == "cuda":
            ids = ids.pin_memory().to(hardware.device, non_blocking=True)
        with torch.autocast(hardware.device_type, torch.bfloat16, enabled=hardware.autocast):
            if norms.due(done):
                norms.measure(done, model, optimizer.groups, ids[: hardware.micro_batch, :-1])
            for rows in ids.split(hardware.micro_batch):
                loss = loss_of(rows[:, :-1], rows[:, 1:]) / tokens_per_step
                loss.backward()
                losses[done] += loss.detach()
        sum_gradients(team, optimizer.groups)
        clip_gradients(team, optimizer.groups, inner.clip)
        optimizer.step()
        share_parameters(team, optimizer.groups)
        done += 1
        now = time.perf_counter()
        if now - watched > _WATCH_EVERY_S:
            recent = losses[max(0, done - 50) : done].mean().item() * team.size
            watch(done, recent, (done - made.steps) * tokens_per_step / (now - began))
            watched = now
    team.sum([losses[made.steps :]])
    return Trained(done, done * tokens_per_step, tuple(losses[:done].tolist()), norms.read(made.norms))
