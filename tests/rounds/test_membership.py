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

from dept_ray.config import Job
from dept_ray.errors import QuorumLost, SiloError, StoreError
from dept_ray.jobfile import parse_job
from dept_ray.messages import Delta, Held, RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import load_round, run_folder
from dept_ray.rounds.membership import choose, deadline_s, judge, refusal
from dept_ray.rounds.pool import Deadline, Meanwhile, nothing
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.sections import FaultsSection

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
ANSWER = an_answer("a", 8, np.ones(6), np.ones((3, 2)), order=ORDER)


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
        ({"attempt": 0}, "7, 0, 0.*asked was.*7, 0, 1"),
        ({"life": 2}, "7, 2, 1.*asked was.*7, 0, 1"),
        ({"scores": {"b": None}}, "scores b, which it does not train on"),
        ({"fingerprint": "beef"}, "'beef'.*asked was.*'f00d'"),
        ({"body": None}, "body: missing"),
        ({"rows": None}, "rows: missing"),
        ({"body": np.ones(5, np.float32)}, r"body: float32 \(5,\), asked was float32 \(6,\)"),
        ({"rows": np.ones((2, 3), np.float32)}, r"rows: float32 \(2, 3\), asked was float32 \(3, 2\)"),
        ({"body": np.ones(6)}, "body: float64"),
        ({"body": spoilt(math.nan, ANSWER.delta("body"))}, "body: not finite"),
        ({"body": spoilt(-math.inf, ANSWER.delta("body"))}, "body: not finite"),
        ({"rows": spoilt(math.inf, ANSWER.delta("rows"))}, "rows: not finite"),
        ({"tokens": 0}, "trained no token"),
        ({"loss": math.nan}, "loss: nan"),
        ({"loss": math.inf}, "loss: inf"),
    ],
)  # fmt: skip
def test_any_other_answer_is_refused_with_its_reason(change, reason):
    found = judge(job_of(), {"a": ORDER}, {"a": replace(ANSWER, **change)}).refused
    assert re.search(reason, found["a"]), found


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
    return {name: replace(ORDER, silo=name, position={name: 3}, body=None, rows=None) for name in silos}


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 16}, "claims 16 tokens for 1 steps, worth 8"),
        ({"position": {"b": 3}}, r"stands at \{'b': 3\} after 1 steps from \{'b': 3\}, worth 1 blocks"),
        ({"position": {"b": 40}}, "stands at"),
        ({"position": {"b": 4, "c": 0}}, "stands at"),
        ({"position": {}}, "stands at"),
        ({"snapshot": "000006-0-1"}, "names snapshot 000006-0-1, asked was 000007-0-1"),
        ({"snapshot": None}, "names snapshot None"),
    ],
)
def test_a_silo_cannot_claim_other_than_its_steps_are_worth(change, reason):
    orders = orders_for(("a", "b"))
    answers = {name: an_answer(name, order=orders[name]) for name in orders}
    assert judge(job_of(), orders, answers).refused == {}
    answers["b"] = replace(answers["b"], **change)
    refused = judge(job_of(), orders, answers).refused
    assert list(refused) == ["b"]
    assert re.search(reason, refused["b"])


def test_where_sources_are_mixed_positions_add_up():
    order = replace(ORDER, silo="mixture", position={"a": 3, "b": 5}, body=None, rows=None)
    fair = an_answer("mixture", 16, order=order, steps=2, position={"a": 5, "b": 5})
    for answer, counts in ((fair, True), (replace(fair, position={"a": 7, "b": 3}), False)):
        assert judge(job_of(), {"mixture": order}, {"mixture": answer}).commit == counts


def test_the_uninvited_are_not_heard():
    orders = orders_for(("a", "b"))
    answers = {name: an_answer(name, order=orders["a"]) for name in ("a", "z")}
    assert list(judge(job_of(), orders, answers).accepted) == ["a"]


def test_whose_delta_was_lost_after_it_had_answered_is_refused():
    def lost() -> Delta:
        raise StoreError("its node is gone")

    orders = orders_for(("a", "b"))
    answers = {name: an_answer(name, order=orders[name]) for name in orders}
    answers["b"] = replace(answers["b"], body=Held(lost))
    verdict = judge(job_of(), orders, answers)
    assert list(verdict.accepted) == ["a"]
    assert verdict.refused == {"b": "StoreError: its node is gone"}


def test_a_held_delta_is_measured_once_as_one_at_hand_is():
    looked = list[int]()

    def fetch() -> Delta:
        looked.append(1)
        return np.float32([3, 4])

    held = Held(fetch)
    assert held.norm == held.norm == 5.0
    assert len(looked) == 1
    assert math.isnan(Held(lambda: np.float32([3, np.nan])).norm)
    assert Held(lambda: np.full(4, 1e30, np.float32)).norm == math.inf


def lengths(norms: dict[str, float], steps: dict[str, int] | None = None, **faults: object) -> dict[str, str]:
    """Who is refused of those whose body's delta has these norms."""
    orders = {name: replace(ORDER, silo=name, position={name: 0}, steps=9, rows=None) for name in norms}
    answers = {
        name: an_answer(name, 8 * each, np.full(6, norm / math.sqrt(6)), order=orders[name], steps=each)
        for name, norm in norms.items()
        if (each := (steps or {}).get(name, 2))
    }
    return judge(job_of(silos=tuple(norms), **faults), orders, answers).refused


def test_a_delta_of_over_three_medians_is_refused_and_one_of_under_three_is_not():
    assert lengths({"a": 1, "b": 1.2, "c": 0.9, "d": 2.9}) == {}
    assert lengths({"a": 1, "b": 1.2, "c": 0.9, "d": 3.4}) == {"d": "body: norm 3.4 is over 3 times the round's median"}
    assert lengths({"a": 1, "b": 99}) == {}  # who of two is wrong?


def test_who_made_more_steps_may_have_gone_further_and_who_made_fewer_may_not():
    norms = {"a": 1, "b": 1, "c": 1, "d": 7}
    assert lengths(norms, {"d": 8}) == {}
    assert list(lengths(norms, {"d": 4})) == ["d"]
    assert list(lengths(norms, {"a": 8, "b": 8, "c": 8})) == ["d"]


def test_who_owns_more_rows_may_move_more_of_them():
    def refused(rows: dict[str, int], norm: float) -> list[str]:
        orders, answers = {}, {}
        for name, count in rows.items():
            sent = np.zeros((count, 1), np.float32)
            orders[name] = replace(ORDER, silo=name, position={name: 3}, body=None, rows=sent)
            delta = np.full_like(sent, norm if name == "d" else 1.0) / math.sqrt(count)
            answers[name] = an_answer(name, rows=delta, order=orders[name])
        return list(judge(job_of(), orders, answers).refused)

    assert refused({"a": 4, "b": 4, "c": 4, "d": 64}, 11.0) == []
    assert refused({"a": 4, "b": 4, "c": 4, "d": 64}, 13.0) == ["d"]
    assert refused({"a": 64, "b": 64, "c": 64, "d": 4}, 3.5) == ["d"]


def test_without_a_past_the_deadline_follows_most_of_those_who_answered():
    faults = FaultsSection(deadline_floor_s=1, deadline_mads=2, deadline_cap_s=500)
    assert deadline_s(faults, [], asked=4, took_s=[10, 12]) == 500
    assert deadline_s(faults, [], asked=4, took_s=[10, 12, 14]) == 16
    assert deadline_s(faults, [20, 22, 24], asked=4, took_s=[10, 12, 14]) == 26


class FakePool:
    """Silos that train nothing; `answers(order)` says what comes back."""

    def __init__(self, job: Job, answers) -> None:
        self.job, self.answers = job, answers
        self.asked: list[dict[str, RoundOrder]] = []

    @property
    def cards(self) -> dict[str, SiloCard]:
        return {source.name: a_card(source.name) for source in self.job.sources}

    remote = False

    def open(self, job: Job, first: Job) -> None:
        assert job == first == self.job

    def add(self, job: Job, silo: str) -> None:
        raise AssertionError(silo)

    def hand_in(self, round: int, attempt: int = 0) -> None:
        raise AssertionError

    def rest(self) -> None:
        pass

    def ready(self) -> set[str]:
        return set(self.cards)

    def failed(self) -> dict[str, str]:
        return {}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
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
    assert records[0]["failed"] == [{"attempt": 0, "refused": {"b": "no answer", "c": "no answer"}}]
    body = load_round(run_folder(job), 1)[0].body.nbytes
    assert records[0]["sent_bytes"] == {"down": 6 * body, "up": 4 * body}  # what was sent in vain was sent
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

    with pytest.raises(QuorumLost, match=r"c: answers \('tiny', 'c', 0, 0, 1.*asked was \('tiny', 'c', 0, 0, 2"):
        train(job, FakePool(job, answers), RunStore(job), lambda record: None, Control())
