"""`Rank`: what each rank of a silo does with an order: its steps, on its own rows of every batch.

It has text, a model and an optimizer, and makes steps with whoever else is in its team. Rank 0's belongs to a `Silo`,
which knows orders, snapshots and messages; the others follow that one in processes of their own (`follower`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloSpec
from dept_ray.silo.hardware import Hardware, choose_hardware, choose_shard
from dept_ray.silo.inner import NOTHING, Schedule, Trained, train_steps
from dept_ray.silo.learner import Learner
from dept_ray.silo.micro_batch import find_micro_batch
from dept_ray.silo.model import num_parameters
from dept_ray.silo.reading import open_corpora, open_stream, vocabulary_of
from dept_ray.silo.team import Team
from dept_ray.silo.trainee import Trainees
from dept_ray.text.stream import Read

Run = Callable[[Callable[[], Any]], Any]
"""Calls what computes, in whatever thread."""


@dataclass(frozen=True)
class Listener:
    """Who looks after steps while they are made; by default nobody."""

    stopped: Callable[[], bool] = lambda: False
    """Whether they are to end; the others end with this rank."""
    watch: Callable[[int, float, float], None] = lambda step, loss, tokens_per_s: None
    """How far they are, about once a second."""
    compiling: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around a first pass, which takes long."""


NOBODY = Listener()


class Rank:
    """One of a silo's.

    Args:
        job: the run.
        spec: what the silo is.
        number: 0 has the whole model; where all is cut, the others have no values.
        read: how blocks become tokens, ahead of time; None reads the shards in this process.
        run: calls what makes its steps.

    Raises:
        ShardError: its shards are missing or altered.
        SiloError: they are too few for one batch.
    """

    def __init__(
        self, job: Job, spec: SiloSpec, number: int = 0, read: Read | None = None, run: Run = lambda compute: compute()
    ) -> None:
        self.job, self.spec, self._run = job, spec, run
        hardware = choose_hardware(job, spec.threads, spec.gpu, spec.compile, spec.ranks)
        self.corpora = open_corpora(job, spec)
        self.vocabulary = vocabulary_of(spec, self.corpora)
        sizes = num_parameters(job.model, job.positions, self.vocabulary.size)
        self.stream = open_stream(job, spec, self.corpora, read)
        hardware = choose_shard(hardware, job, spec.shard, sizes)
        self.learner = learner = Learner(job, spec, hardware, self.vocabulary.size, number)
        self.trainees = Trainees(learner)
        if spec.gpu and job.inner.micro_batch is None:
            found = find_micro_batch(learner.model, learner.optimizer.tensors, job, hardware, spec.gpu_part)
            learner.hardware = replace(hardware, micro_batch=found)

    @property
    def hardware(self) -> Hardware:
        """What it runs on."""
        return self.learner.hardware

    def batches(self, order: RoundOrder, made: int = 0) -> Iterator[np.ndarray]:
        """The batches of an order, but for the first that were `made`: (B, T + 1) local ids each."""
        position = self.stream.advance(order.position, made)
        batches = self.stream.batches(position, order.steps - made)
        return (self.vocabulary.to_local(batch) for batch in batches)

    def steps(
        self, order: RoundOrder, team: Team, batches: Iterable[np.ndarray], made: Trained = NOTHING,
        listener: Listener = NOBODY,
    ) -> Trained:  # fmt: skip
        """Make an order's steps on some of its batches, beginning where rank 0 stands; all ranks must ask alike.

        Args:
            order: which learning rates they have.
            team: all ranks.
            batches: as `batches` gives them.
            made: what was made of the order before.
            listener: may end them early.

        Raises:
            SiloError: another rank is gone.
        """
        with team.listening(), self.trainees.of(team) as trainee:
            if trainee.to_compile:
                with listener.compiling():
                    trainee.compile()
            trainee.spread(team)
            steps = partial(
                train_steps,
                trainee.model,
                trainee.loss_of,
                trainee.optimizer,
                batches,
                job=self.job,
                hardware=self.hardware,
                schedule=self._schedule(order),
                should_stop=lambda: team.any(listener.stopped()),
                watch=listener.watch,
                team=team,
                made=made,
            )
            trained: Trained = self._run(steps)
            trainee.gather(team)
            return trained

    def follow(self, order: RoundOrder, moments: Mapping[str, Sequence[int]], team: Team) -> None:
        """Train along with the rank 0 that obeys an order, beginning with all that it has.

        Args:
            order: without its arrays.
            moments: shapes of the optimizer's, by name.
            team: all ranks.

        Raises:
            SiloError: another rank is gone.
        """
        torch.set_num_threads(self.spec.threads)
        shapes = {name: torch.empty(tuple(shape), device="meta") for name, shape in moments.items()}
        self.learner.begin_moments(shapes)
        self.steps(order, team, self.batches(order))

    def close(self) -> None:
        """Stop reading ahead."""
        self.stream.close()

    def _schedule(self, order: RoundOrder) -> Schedule:
        inner = self.job.inner
        return Schedule(
            first_step=order.first_step, steps=order.steps, total_steps=order.total_steps, peak=order.lr,
            warmup=inner.warmup_steps, floor=inner.lr_floor,
            embedding_period=order.steps if self.spec.reset_embedding else None, frozen_steps=order.frozen_steps,
        )  # fmt: skip
