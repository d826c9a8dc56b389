"""`Trainee`: what one rank of a silo trains with an order's batches, and how it gets that from rank 0 and back.

`Copy`: every rank has all parameters, and steps all of them or its part (`parts`). Where not even the parameters have
room, it is a shard of them (`sharded`).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

from dept_ray.silo.compiling import LossOf, compile_now, compiled_loss
from dept_ray.silo.learner import Learner
from dept_ray.silo.model import LanguageModel
from dept_ray.silo.optimizer import Optimizer
from dept_ray.silo.parts import gather_moments, spread
from dept_ray.silo.team import Team


class Trainee(Protocol):
    """One rank's."""

    @property
    def model(self) -> LanguageModel:
        """What it computes with."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Of what this rank steps."""
        ...

    @property
    def loss_of(self) -> LossOf:
        """The model's loss, or its compiled twin."""
        ...

    @property
    def to_compile(self) -> bool:
        """Whether its first pass, which takes long, is still to come."""
        ...

    def compile(self) -> None:
        """Make that first pass."""
        ...

    def spread(self, team: Team) -> None:
        """Begin where rank 0 stands; all ranks must ask alike."""
        ...

    def gather(self, team: Team) -> None:
        """Let rank 0 have what was trained, as a whole.

        Raises:
            SiloError: ranks that have the same parameters have not the same bits.
        """
        ...


class Copy:
    """The whole model, on every rank.

    Args:
        learner: this rank's.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner, self.model = learner, learner.model
        self.to_compile = learner.hardware.compile
        self.loss_of: LossOf = compiled_loss(self.model) if self.to_compile else self.model.loss

    @property
    def optimizer(self) -> Optimizer:
        return self._learner.optimizer

    def compile(self) -> None:
        learner = self._learner
        batch = learner.hardware.micro_batch, learner.job.inner.context
        compile_now(self.loss_of, self.optimizer.tensors, batch, learner.hardware.autocast)
        self.to_compile = False

    def spread(self, team: Team) -> None:
        spread(team, self.optimizer, self._learner.hardware.device)

    def gather(self, team: Team) -> None:
        team.check_equal(self.optimizer.tensors)
        if self._learner.keeps_moments:
            gather_moments(team, self.optimizer)


class Trainees:
    """Of one rank of a silo: the one that suits its hardware.

    Args:
        learner: this rank's.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner, self.copy = learner, Copy(learner)
        self._compiled_by = WeakSet[Team]()
        """Teams whose first pass through a cut one was made: all ranks of a team make it, or none. One that was left is
        not held: its store would go on listening."""

    @contextmanager
    def of(self, team: Team) -> Iterator[Trainee]:
        """That which trains with a team, for one order; all its ranks must ask alike.

        Raises:
            SiloError: another rank is gone, or this process has another silo that is cut.
        """
        if self._learner.hardware.shard != "all":
            yield self.copy
            return
        from dept_ray.silo.sharded import Sharded  # a second to import, for those alone who need it

        gc.collect()  # what one whose order failed has left behind
        cut = Sharded(self._learner, team, team in self._compiled_by)
        try:
            yield cut
            self._compiled_by.add(team)
        finally:
            cut.release()
