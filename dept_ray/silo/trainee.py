"""`Trainee`: what one rank of a silo trains with an order's batches, and how it gets that from rank 0 and back.

`Copy`: every rank has all parameters, and steps all of them or its part (`parts`). Where not even the parameters have
room, it is a shard of them (`sharded`).
"""

from dataclasses import replace
from typing import Protocol

from dept_ray.silo.compiling import LossOf, compile_now, compiled_loss
from dept_ray.silo.learner import Learner
from dept_ray.silo.micro_batch import find_micro_batch
from dept_ray.silo.model import LanguageModel
from dept_ray.silo.optimizer import Optimizer
from dept_ray.silo.parts import gather_moments, spread
from dept_ray.silo.team import ALONE, Team


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
            SiloError: ranks that should have the same bits have not.
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
        learner: this rank's; where its hardware leaves the micro-batch open, that is found out.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._cut: Trainee | None = None
        self._cut_for = ALONE
        self.copy = Copy(learner)
        if learner.hardware.shard != "all":
            self._find_micro_batch(self.copy, ALONE)

    def of(self, team: Team) -> Trainee:
        """That which trains with a team; all its ranks must ask alike.

        Raises:
            SiloError: it has no room, or another rank is gone.
        """
        if self._learner.hardware.shard != "all":
            return self.copy
        if self._cut is None or self._cut_for is not team:
            from dept_ray.silo.sharded import Sharded  # a second to import, for those alone who need it

            self._cut = None  # give back its memory first
            cut = Sharded(self._learner, team)
            self._find_micro_batch(cut, team)
            self._cut, self._cut_for = cut, team
        return self._cut

    def _find_micro_batch(self, trainee: Trainee, team: Team) -> None:
        learner = self._learner
        if learner.spec.gpu and learner.job.inner.micro_batch is None:
            found = find_micro_batch(
                trainee.model, trainee.optimizer.tensors, learner.job, learner.hardware, learner.spec.gpu_part
            )
            learner.hardware = replace(learner.hardware, micro_batch=team.least(found))
