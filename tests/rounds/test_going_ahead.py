"""Who may make steps ahead of an order is the coordinator's to say, and follows from the state alone."""

import pytest
from faults import Faults, FaultyPool
from ordeals import smallest

from dept_ray.config import Job
from dept_ray.messages import RoundOrder
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train


def orders_of(job: Job, faults: Faults) -> dict[tuple[int, int, str], RoundOrder]:
    pool = FaultyPool(faults, {}, {})
    train(job, pool, RunStore(job), lambda record: None, Control())
    pool.close()
    return pool.orders


def test_only_who_counted_in_the_round_before_goes_ahead(prepared, tmp_path):
    job = smallest(prepared, tmp_path, "trim", rounds={"total": 5}, inner={"ahead_steps": 2})
    orders = orders_of(job, Faults(raises_at={(2, 0, "code")}, absent_at={(2, "latin")}))
    assert [orders[round, 0, "code"].ahead for round in range(5)] == [0, 2, 2, 0, 2]
    assert [orders[round, 0, "numbers"].ahead for round in range(5)] == [0, 2, 2, 2, 2]


def test_a_round_that_is_tried_again_has_the_same_steps_ahead(prepared, tmp_path):
    job = smallest(prepared, tmp_path, "spec", inner={"ahead_steps": 1}, faults={"quorum": 1.0})
    orders = orders_of(job, Faults(raises_at={(1, 0, "code")}))
    assert [orders[1, attempt, "code"].ahead for attempt in (0, 1)] == [1, 1]


@pytest.mark.parametrize("method", ["std", "isolated"])
def test_where_nothing_is_shared_there_is_nothing_to_wait_for(prepared, tmp_path, method):
    job = smallest(prepared, tmp_path, method, inner={"ahead_steps": 2})
    assert {order.ahead for order in orders_of(job, Faults()).values()} == {0}
