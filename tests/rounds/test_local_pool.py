"""`LocalPool` keeps the contract of all pools."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from contract import Harness, PoolContract
from faulty_silo import Died, FaultySilo, Moment

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing, specs_of


class MortalPool(LocalPool):
    """Whose silos can be lost: what is made anew has forgotten everything."""

    def open(self, job: Job, first: Job) -> None:
        self.job = job
        super().open(job, first)

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        answers = super().run_round(orders, deadline, meanwhile)
        for name, answer in answers.items():
            if isinstance(answer, Died):
                self.silos[name].stream.close()
                self.silos[name] = self.make(self.job, specs_of(self.job, self.first)[name])
        return answers


@pytest.fixture
def harness() -> Harness:
    def make(plan: Mapping[Moment, str], notes: Path) -> LocalPool:
        return MortalPool(partial(FaultySilo, plan, str(notes), False))

    return Harness(make)


class TestLocalPool(PoolContract):
    """In this process."""
