"""Steps ahead of an order are those that would be made under it; when they were made changes nothing but the time."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_silo import assert_same, first_order, stop_before_batch

from dept_ray.codec import decoded
from dept_ray.config import Job
from dept_ray.draws import fingerprint_of
from dept_ray.errors import ConfigError, ShardError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.rounds.pool import specs_of
from dept_ray.silo.silo import Silo
from dept_ray.silo.snapshot import load_snapshot, silo_folder

AHEAD = 3
SHARING = [("spec", "reset"), ("spec-opt", "keep"), ("trim", "reset"), ("glob", "keep")]


@pytest.fixture
def open_silo(tiny: Callable[..., Job]) -> Iterator[Callable[..., Silo]]:
    """`open_silo(method, **overrides)`: the first silo of a job of its own that goes ahead."""
    opened: list[Silo] = []

    def make(method: str = "spec", optimizer_state: str = "reset", ahead: int = AHEAD, **more: Any) -> Silo:
        inner = {"ahead_steps": ahead, "optimizer_state": optimizer_state, "lr": 1e-2}
        job = tiny(method, at=f"run{len(opened)}", inner=inner, **more)
        opened.append(Silo(job, next(iter(specs_of(job).values()))))
        return opened[-1]

    yield make
    for silo in opened:
        silo.close()


def next_order(silo: Silo, order: RoundOrder, update: SiloUpdate, **change: Any) -> RoundOrder:
    """What is ordered next, by a coordinator whose mean went another way than this silo."""
    draw = np.random.default_rng(order.round)

    def moved(vector: Any) -> Any:
        return None if vector is None else vector + draw.normal(0, 1e-3, vector.shape).astype(np.float32)

    body = moved(order.body)
    values = {
        "round": order.round + 1, "first_step": order.first_step + order.steps, "after": update.snapshot,
        "position": update.position, "body": body, "rows": moved(order.rows), "fingerprint": fingerprint_of(body),
        "ahead": silo.job.inner.ahead_steps,
    }  # fmt: skip
    return dataclasses.replace(order, **values | change)


def obeyed(silo: Silo, orders: int = 1) -> tuple[RoundOrder, SiloUpdate]:
    """The silo has obeyed so many orders: the last, and what it answered."""
    order = first_order(silo.job, silo)
    update = silo.obey(order)
    for _ in range(orders - 1):
        order = next_order(silo, order, update)
        update = silo.obey(order)
    return order, update


def count_batches(silo: Silo) -> list[int]:
    """How many batches each later call reads."""
    batches, read = silo.stream.batches, list[int]()

    def counted(position: Any, steps: int) -> Iterator[np.ndarray]:
        read.append(0)
        for batch in batches(position, steps):
            read[-1] += 1
            yield batch

    silo.stream.batches = counted
    return read


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize(("method", "optimizer_state"), SHARING)
def test_what_was_made_early_has_the_bits_of_what_is_made_in_time(open_silo, method, optimizer_state, ahead):
    early, in_time = (open_silo(method, optimizer_state, ahead) for _ in range(2))
    orders = list[RoundOrder]()
    for silo in (early, in_time):
        order, update = obeyed(silo)
        for _ in range(2):
            if silo is early:
                silo.go_ahead()
            order = next_order(silo, order, update, score=True)
            orders.append(order)
            update = silo.obey(order)
            assert update.steps == 4
            orders.append(update)
    half = len(orders) // 2
    for mine, other in zip(orders[1:half:2], orders[half + 1 :: 2], strict=True):
        assert_same(mine, other)
        assert "ahead" in mine.seconds
        assert "ahead" not in other.seconds


def test_the_steps_ahead_go_from_where_the_silo_stood_and_are_laid_onto_the_new_body(open_silo):
    """With all steps ahead the delta is what one moves who was never told of the others."""
    silo, alone = open_silo("trim", ahead=4), open_silo("trim", ahead=4)
    order, update = obeyed(silo)
    told = silo.obey(next_order(silo, order, update))
    order, update = obeyed(alone)
    assert update.body is not None
    assert update.rows is not None
    body, rows = order.body + update.body, order.rows + update.rows
    untold = alone.obey(
        next_order(alone, order, update, body=body, rows=rows, fingerprint=fingerprint_of(body), ahead=0)
    )
    for mine, other in ((told.body, untold.body), (told.rows, untold.rows)):  # to what AdamW makes of the last bit
        assert np.linalg.norm(mine - other) < 1e-3 * np.linalg.norm(other)
    assert told.loss == pytest.approx(untold.loss, rel=1e-6)


def test_early_steps_are_not_made_twice(open_silo):
    silo = open_silo()
    order, update = obeyed(silo)
    read = count_batches(silo)
    silo.go_ahead()
    silo.obey(next_order(silo, order, update))
    assert read == [AHEAD, 4 - AHEAD]


@pytest.mark.parametrize("stops_before", [1, 2])
def test_who_is_stopped_while_it_goes_ahead_makes_the_rest_under_the_order(open_silo, stops_before):
    silo, plain = open_silo(), open_silo()
    order, update = obeyed(silo)
    read = count_batches(silo)
    stop_before_batch(silo, stops_before, order.round, order.attempt)
    silo.go_ahead()
    expected = plain.obey(next_order(plain, *obeyed(plain)))
    assert_same(silo.obey(next_order(silo, order, update)), expected)
    assert len(read) == 2
    assert sum(read) == 5  # one was read, and read again


def test_who_is_stopped_in_a_later_round_does_not_go_ahead_for_longer(open_silo):
    """The request may be here before the one that ends its steps ahead."""
    silo = open_silo()
    order, _ = obeyed(silo)
    read = count_batches(silo)
    silo.stop(order.round + 1, 0)
    silo.go_ahead()
    assert sum(read) == 2  # one was made, one read


CHANGES: list[dict[str, Any]] = [
    {"lr": 3e-3}, {"steps": 3}, {"total_steps": 99}, {"ahead": 0}, {"frozen_steps": 2}, {"first_step": 7},
    {"ahead": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_under_another_order_than_expected_early_steps_count_for_nothing(open_silo, change):
    silo, plain = open_silo("trim", "keep"), open_silo("trim", "keep")
    order, update = obeyed(silo)
    silo.go_ahead()
    expected = plain.obey(next_order(plain, *obeyed(plain), **change))
    found = silo.obey(next_order(silo, order, update, **change))
    assert_same(found, expected)
    assert "ahead" not in found.seconds


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_round_that_is_lost_is_made_again_with_its_steps_ahead(open_silo, codec):
    """By the same silo, and by one that was made anew and has but the snapshot."""
    silo = open_silo("trim", wire={"codec": codec})
    order, update = obeyed(silo)
    second = next_order(silo, order, dataclasses.replace(update, body=None, rows=None))
    silo.go_ahead()
    expected = arrived(silo.obey(second))
    silo.go_ahead()
    assert_same(arrived(silo.obey(second)), expected)
    anew = Silo(silo.job, silo.spec)
    assert_same(arrived(anew.obey(second)), expected)
    anew.close()


def arrived(update: SiloUpdate) -> SiloUpdate:
    """With its deltas decoded."""
    return dataclasses.replace(update, body=decoded(update.body), rows=decoded(update.rows))


def test_what_is_scored_is_the_state_that_was_ordered_and_no_step_ahead_of_it(open_silo):
    silo, plain = open_silo(), open_silo(ahead=0)
    order, update = obeyed(silo)
    silo.go_ahead()
    found = silo.obey(next_order(silo, order, update, score=True))
    assert found.scores == plain.obey(next_order(plain, *obeyed(plain), score=True)).scores
    silo.go_ahead()
    scored = next_order(silo, order, update, score=True, steps=0, ahead=0)
    assert silo.obey(scored).scores == found.scores


def test_after_the_last_round_nobody_goes_ahead(open_silo):
    silo = open_silo()
    order, _ = obeyed(silo, 3)
    assert order.first_step + order.steps == order.total_steps
    read = count_batches(silo)
    silo.go_ahead()
    assert read == []


@pytest.mark.parametrize("method", ["std", "act", "isolated"])
def test_where_nothing_is_shared_nobody_goes_ahead(tiny, method):
    job = tiny(method, inner={"ahead_steps": 4})
    silo = Silo(job, next(iter(specs_of(job).values())))
    update = silo.obey(first_order(job, silo))
    read = count_batches(silo)
    silo.go_ahead()
    silo.close()
    assert read == []
    assert "left" not in load_snapshot(silo_folder(job, silo.spec.silo) / str(update.snapshot))[0]


def test_a_text_that_breaks_off_while_it_goes_ahead_costs_the_early_steps_alone(open_silo):
    silo, plain = open_silo(optimizer_state="keep"), open_silo(optimizer_state="keep")
    order, update = obeyed(silo)
    batches = silo.stream.batches

    def broken(position: Any, steps: int) -> Iterator[np.ndarray]:
        yield from itertools.islice(batches(position, steps), 1)
        raise ShardError("the disk went away")

    silo.stream.batches = broken
    with pytest.raises(ShardError):
        silo.go_ahead()
    silo.stream.batches = batches
    assert_same(silo.obey(next_order(silo, order, update)), plain.obey(next_order(plain, *obeyed(plain))))


def test_a_snapshot_holds_what_was_shared_where_somebody_goes_ahead_and_else_does_not(open_silo):
    silo, plain = open_silo("trim"), open_silo("trim", ahead=0)
    left = {}
    for each in (silo, plain):
        _, update = obeyed(each)
        left[each] = load_snapshot(silo_folder(each.job, "code") / str(update.snapshot))[0].get("left")
    assert left[plain] is None
    assert torch.equal(left[silo]["body"], silo.body)
    assert sorted(left[silo]) == ["body", "rows"]


@pytest.mark.parametrize(
    ("inner", "resources", "told"),
    [
        ({"ahead_steps": 5}, {}, r"inner\.ahead_steps = 5 is above inner\.local_steps = 4.*lower"),
        ({"ahead_steps": 1}, {"ranks": 2}, r"inner\.ahead_steps = 1 and resources\.ranks = 2"),
    ],
)
def test_a_job_that_cannot_go_ahead_is_refused(tiny, inner, resources, told):
    with pytest.raises(ConfigError, match=told):
        tiny("spec", inner=inner, resources=resources)
