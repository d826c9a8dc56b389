"""When a round becomes a fact where silos live elsewhere: while the next one trains, and never later than it must."""

from collections.abc import Callable, Mapping

import pytest
from test_membership import FakePool, job_of, obedient

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import Deadline, Meanwhile, nothing
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train


class Elsewhere(FakePool):
    """Notes which round is a fact when orders go out, and which when their answers are in."""

    remote = True

    def __init__(self, job: Job, answers: Callable[[RoundOrder], SiloUpdate | Exception], store: RunStore) -> None:
        super().__init__(job, answers)
        self.store = store
        self.facts: list[tuple[int, int]] = []

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        before = self.store.stands().round
        answers = super().run_round(orders, deadline)
        meanwhile()
        self.facts.append((before, self.store.stands().round))
        return answers


def facts(job: Job, answers: Callable[[RoundOrder], SiloUpdate | Exception]) -> list[tuple[int, int]]:
    """Of each order that trained, and of the last that only scores."""
    store = RunStore(job)
    pool = Elsewhere(job, answers, store)
    train(job, pool, store, lambda record: None, Control())
    return pool.facts


def test_the_next_orders_are_out_before_a_round_is_written_and_the_last_round_waits_for_nobody(tmp_path):
    job = job_of(tmp_path, ("a", "b"), total=3)
    assert facts(job, obedient) == [(0, 0), (0, 1), (1, 2), (3, 3)]


def test_a_round_in_which_someone_was_refused_is_a_fact_before_anything_else(tmp_path):
    job = job_of(tmp_path, ("a", "b", "c"), total=3)

    def answers(order: RoundOrder) -> SiloUpdate | Exception:
        return SiloError("gone") if (order.silo, order.round) == ("b", 0) else obedient(order)

    assert facts(job, answers) == [(0, 0), (1, 1), (1, 2), (3, 3)]


def test_a_round_stands_when_the_next_one_cannot_even_be_ordered(tmp_path):
    job = job_of(tmp_path, ("a", "b"), total=3)

    def answers(order: RoundOrder) -> SiloUpdate:
        if order.round:
            raise SiloError("the object store is full")
        return obedient(order)

    store = RunStore(job)
    with pytest.raises(SiloError, match="object store is full"):
        train(job, Elsewhere(job, answers, store), store, lambda record: None, Control())
    assert store.rounds() == [1]
