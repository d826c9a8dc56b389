"""Who works is drawn from labels; an answer counts only if it answers the order; a round counts only with a quorum."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tiny import a_card, an_answer

from dept_ray.config import FaultsSection, Job, parse_job
from dept_ray.errors import QuorumLost, SiloError, StoreError
from dept_ray.messages import RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.rounds.control import Control
from dept_ray.rounds.membership import choose, judge, refusal
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train

SILOS = ("a", "b", "c", "d", "e")


def job_of(folder: Path | str = ".", silos: tuple[str, ...] = SILOS, seed: int = 0, **rounds: object) -> Job:
    sources = [{"kind": "installed", "collection": "docs", "name": name} for name in silos]
    model = {"layers": 1, "width": 8, "heads": 1}
    faults = {key: rounds.pop(key) for key in [*rounds] if key in FaultsSection.model_fields}
    return parse_job(
        {"name": "tiny", "method": "spec", "folder": str(folder), "seed": seed, "sources": sources, "model": model,
         "inner": {"context": 8, "batch_size": 1, "local_steps": 2}, "rounds": rounds,
         "faults": faults}
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ who works


def test_all_work_unless_fewer_are_chosen():
    assert choose(job_of(), reversed(SILOS), 3) == list(SILOS)
    assert choose(job_of(choose=4), ("e", "b"), 3) == ["b", "e"]


def test_the_choice_is_a_function_of_seed_and_round_alone():
    job = job_of(choose=2)
    drawn = [choose(job, SILOS, round) for round in range(20)]
    assert [choose(job, reversed(SILOS), round) for round in reversed(range(20))] == drawn[::-1]
    assert len({tuple(names) for names in drawn}) > 5
    assert [choose(job_of(choose=2, seed=1), SILOS, round) for round in range(20)] != drawn


def test_the_chosen_are_sorted_and_different():
    for round in range(50):
        names = choose(job_of(choose=3), SILOS, round)
        assert names == sorted(set(names))
        assert len(names) == 3


def test_every_pair_is_drawn_about_as_often():
    rounds, pairs = 2000, list(combinations(SILOS, 2))
    found = Counter(tuple(choose(job_of(choose=2), SILOS, round)) for round in range(rounds))
    assert set(found) == set(pairs)
    expected = rounds / len(pairs)
    assert sum((found[pair] - expected) ** 2 / expected for pair in pairs) < 28  # chi squared, 9 degrees: p = 0.001


# ------------------------------------------------------------------------------------------------ what is refused

ORDER = RoundOrder(
    run="tiny", silo="a", round=7, attempt=1, after=None, position={"a": 0}, first_step=14, steps=2, score=False,
    fingerprint="f00d", body=np.zeros(6, np.float32), rows=np.zeros((3, 2), np.float32),
)  # fmt: skip
ANSWER = an_answer("a", 16, np.ones(6), np.ones((3, 2)), order=ORDER)


def spoilt(value: float, like: np.ndarray | None) -> np.ndarray:
    assert like is not None
    array = like.copy()
    array.flat[-1] = value
    return array


def test_the_answer_to_the_order_counts():
    assert refusal(ORDER, ANSWER) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "other"}, "'other'.*asked was.*'tiny'"),
        ({"silo": "b"}, "'b'.*asked was.*'a'"),
        ({"round": 6}, "6.*asked was.*7"),
        ({"attempt": 0}, "7, 0.*asked was.*7, 1"),
        ({"fingerprint": "beef"}, "'beef'.*asked was.*'f00d'"),
        ({"body": None}, "body: missing"),
        ({"rows": None}, "rows: missing"),
        ({"body": np.ones(5, np.float32)}, r"body: float32 \(5,\), asked was float32 \(6,\)"),
        ({"rows": np.ones((2, 3), np.float32)}, r"rows: float32 \(2, 3\), asked was float32 \(3, 2\)"),
        ({"body": np.ones(6)}, "body: float64"),
        ({"body": spoilt(math.nan, ANSWER.body)}, "body: not finite"),
        ({"body": spoilt(-math.inf, ANSWER.body)}, "body: not finite"),
        ({"rows": spoilt(math.inf, ANSWER.rows)}, "rows: not finite"),
        ({"tokens": 0}, "trained no token"),
        ({"loss": math.nan}, "loss: nan"),
        ({"loss": math.inf}, "loss: inf"),
    ],
)  # fmt: skip
def test_any_other_answer_is_refused_with_its_reason(change, reason):
    found = refusal(ORDER, replace(ANSWER, **change))
    assert found is not None
    assert re.search(reason, found), found


def test_arrays_that_stay_home_are_not_wanted():
    at_home = ORDER.without_arrays()
    assert refusal(at_home, ANSWER.without_arrays()) is None
    assert refusal(at_home, replace(ANSWER, rows=None)) == "body: was not asked for"
    assert refusal(at_home, replace(ANSWER, body=None)) == "rows: was not asked for"


def test_no_answer_and_an_exception_are_reasons_too():
    assert refusal(ORDER, None) == "no answer"
    assert refusal(ORDER, SiloError("out of memory")) == "SiloError: out of memory"


def test_who_only_scores_trains_no_token_and_sends_no_array():
    order = replace(ORDER, steps=0)
    assert refusal(order, replace(ANSWER, tokens=0, steps=0, loss=math.nan, body=None, rows=None)) is None


# ------------------------------------------------------------------------------------------------ whether it counts


def orders_for(silos: tuple[str, ...]) -> dict[str, RoundOrder]:
    return {name: replace(ORDER, silo=name, body=None, rows=None) for name in silos}


@pytest.mark.parametrize(
    ("quorum", "silos", "needed"),
    [(0.5, 4, 2), (0.5, 5, 3), (1.0, 3, 3), (0.01, 5, 1), (0.67, 3, 3), (0.6, 5, 3), (0.55, 20, 11), (0.28, 25, 7)],
)
def test_a_quorum_is_a_share_rounded_up(quorum, silos, needed):
    names = tuple(f"s{i:02d}" for i in range(silos))
    job, orders = job_of(silos=names, quorum=quorum), orders_for(names)
    for count in range(silos + 1):
        answers = {name: an_answer(name, order=orders[name]) for name in names[:count]}
        verdict = judge(job, orders, answers)
        assert verdict.commit == (count >= needed), f"{count} of {silos}"
        assert list(verdict.accepted) == list(names[:count])
        assert verdict.refused == dict.fromkeys(names[count:], "no answer")


def test_the_uninvited_are_not_heard():
    orders = orders_for(("a", "b"))
    answers = {name: an_answer(name, order=orders["a"]) for name in ("a", "z")}
    assert list(judge(job_of(), orders, answers).accepted) == ["a"]


class FakePool:
    """Silos that train nothing; `answers(order)` says what comes back."""

    def __init__(self, job: Job, answers) -> None:
        self.job, self.answers = job, answers
        self.asked: list[dict[str, RoundOrder]] = []

    @property
    def cards(self) -> dict[str, SiloCard]:
        return {source.name: a_card(source.name) for source in self.job.sources}

    def open(self, job: Job) -> None:
        assert job == self.job

    def add(self, job: Job, silo: str) -> None:
        raise AssertionError(silo)

    def ready(self) -> set[str]:
        return set(self.cards)

    def failed(self) -> dict[str, str]:
        return {}

    def run_round(self, orders: Mapping[str, RoundOrder], deadline_s: float) -> dict[str, SiloUpdate | Exception]:
        self.asked.append(dict(orders))
        return {name: answer for name, order in orders.items() if (answer := self.answers(order)) is not None}

    def statuses(self) -> dict[str, SiloStatus]:
        return {}

    def close(self) -> None:
        pass


def obedient(order: RoundOrder) -> SiloUpdate:
    body = None if order.body is None else np.ones_like(order.body)
    return an_answer(order.silo, 8 * order.steps, body, order=order, steps=order.steps)


def test_the_quorum_is_lost_after_so_many_attempts_and_every_reason_is_told(tmp_path):
    job = job_of(tmp_path, ("a", "b", "c"), attempts=3)
    poisoned = {"b": SiloError("the disk is full"), "c": None}
    pool = FakePool(job, lambda order: poisoned.get(order.silo, obedient(order)) if order.round else obedient(order))
    store, records = RunStore(job), []
    with pytest.raises(
        QuorumLost,
        match=r"round 2 failed 3 times, 1 of 3 .*b: SiloError: the disk is full; c: no answer.*round 1 stands",
    ):
        train(job, pool, store, records.append, Control())
    assert [{order.attempt for order in asked.values()} for asked in pool.asked] == [{0}, {0}, {1}, {2}]
    assert store.rounds() == [1]
    assert [record["round"] for record in records] == [1]


def test_a_second_attempt_that_succeeds_counts_and_the_refused_are_on_record(tmp_path):
    job = job_of(tmp_path, ("a", "b", "c"), total=1)
    pool = FakePool(job, lambda order: obedient(order) if order.attempt or order.silo == "a" else None)
    records: list[dict] = []
    state = train(job, pool, RunStore(job), records.append, Control())
    assert (records[0]["attempt"], records[0]["refused"]) == (1, {})
    assert sorted(records[0]["silos"]) == ["a", "b", "c"]
    assert state.silos["a"].tokens == 16  # what the lost attempt trained does not count


def test_a_round_goes_on_without_the_refused_and_says_why(tmp_path):
    job = job_of(tmp_path, ("a", "b", "c"), total=1)
    pool = FakePool(job, lambda order: StoreError("no room") if order.silo == "b" and order.steps else obedient(order))
    records: list[dict] = []
    state = train(job, pool, RunStore(job), records.append, Control())
    assert records[0]["refused"] == {"b": "StoreError: no room"}
    assert (state.silos["b"].snapshot, state.silos["b"].rounds) == (None, 0)


def test_a_late_answer_to_the_attempt_before_is_refused(tmp_path):
    job = job_of(tmp_path, ("a", "b", "c"), total=1, quorum=1.0)

    def answers(order: RoundOrder) -> SiloUpdate | None:
        if order.silo == "c" and order.steps:  # always one attempt behind
            return an_answer("c", 32, np.ones_like(order.body), order=order, attempt=order.attempt - 1)
        return obedient(order)

    with pytest.raises(QuorumLost, match=r"c: answers \('tiny', 'c', 0, 1.*asked was \('tiny', 'c', 0, 2"):
        train(job, FakePool(job, answers), RunStore(job), lambda record: None, Control())
