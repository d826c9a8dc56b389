"""What every `SiloPool` owes: the same truths for silos in this process and for actors that really die.

A test module that has a fixture `harness` runs these by inheriting `PoolContract` (tests/rounds/test_local_pool.py,
tests/on_ray/test_contract.py).
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_silo import FAULTS, Moment, reads_of
from lives import Ordeal, relive
from ordeals import NEWCOMER, compare, newcomer, smallest

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import Change, RoundOrder, SiloUpdate
from dept_ray.metrics import JsonLines, Log, read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import LocalPool, SiloPool
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train


@dataclass
class Harness:
    """Makes pools of one kind, whose silos fail as planned."""

    make: Callable[[Mapping[Moment, str], Path], SiloPool]


def endure_once(
    harness: Harness, job: Job, plan: Mapping[Moment, str], asks: Mapping[int, list[Change]] | None = None,
    notes: Path | None = None, stop_after: int | None = None,
) -> Ordeal:  # fmt: skip
    """One life of a run; `asks` are changes by the number of rounds after which they are to be true.

    They are asked while the last of these trains: a pool that is remote has no round on record by then.
    """
    notes = notes or Path(job.folder) / "notes"
    pool, control, store, asks = harness.make(plan, notes), Control(), RunStore(job), asks or {}
    train_round = pool.run_round

    def run_round(orders: Mapping[str, RoundOrder], *more: Any) -> dict[str, SiloUpdate | Exception]:
        for rounds in {order.round + 1 for order in orders.values() if order.attempt == 0}:
            for change in asks.get(rounds, []):
                control.change(change)
            if rounds == stop_after:
                control.stop()
        return train_round(orders, *more)

    pool.run_round = run_round
    try:
        state = train(job, pool, store, Log(JsonLines(store.metrics)), control)
    finally:
        pool.close()
    lost = {moment: FAULTS[fault] for moment, fault in plan.items() if FAULTS[fault]}
    return Ordeal(job, state, read_records(store.metrics), lost, reads_of(notes), 1, [], [])


class PoolContract:
    """The truths; `harness` is a fixture of the module that inherits them."""

    @pytest.mark.parametrize(("method", "ahead"), [("spec-opt", 0), ("trim", 0), ("trim", 2)])
    def test_what_was_lost_had_simply_not_been_chosen(self, harness, prepared, tmp_path, monkeypatch, method, ahead):
        """Silos die before, within and after, raise, send NaN, repeat themselves, are late; others join and leave.

        Where they make steps ahead of their orders, those of the reference run make none early.
        """
        plan = {
            (0, 0, "latin"): "dies within", (1, 0, "code"): "raises", (2, 0, "numbers"): "nan",
            (3, 0, "latin"): "dies after", (4, 0, "code"): "late", (4, 0, "numbers"): "duplicate",
            (5, 0, "code"): "dies before",
        }  # fmt: skip
        asks = {1: [{"add": newcomer(prepared)}], 3: [{"drop": "numbers"}], 4: [{"return": "numbers"}]}
        inner = {"optimizer_state": "keep", "ahead_steps": ahead, "local_steps": 4 if ahead else 2}
        overrides = {"rounds": {"total": 7}, "inner": inner, "outer": {"preset": "nesterov"}}
        ordeal = endure_once(harness, smallest(prepared, tmp_path / "ordeal", method, **overrides), plan, asks)
        compare(ordeal, relive(ordeal, smallest(prepared, tmp_path / "reference", method, **overrides), monkeypatch))
        late = ordeal.rounds[4]["silos"]["code"]
        assert late["tokens"] == late["steps"] * 32
        assert 1 <= late["steps"] <= max(1, ahead)
        assert NEWCOMER in ordeal.rounds[-1]["silos"]
        assert [r["away"] for r in ordeal.rounds] == [{}] * 3 + [{"numbers": "dropped"}] + [{}] * 3

    def test_who_always_fails_is_set_aside_with_its_reason(self, harness, prepared, tmp_path):
        plan = {(round, 0, "latin"): "raises" for round in range(4)}
        job = smallest(prepared, tmp_path, "trim", rounds={"total": 3}, faults={"failures": 2})
        ordeal = endure_once(harness, job, plan)
        assert ["latin" in r["refused"] for r in ordeal.rounds] == [True, True, False]
        told = r"set aside after 2 failures in a row, the last: .*the fan is broken"
        assert re.fullmatch(told, ordeal.state.silos["latin"].away)
        assert ordeal.state.silos["code"].rounds == 3

    @pytest.mark.parametrize("ahead", [0, 40_000])
    def test_a_round_that_is_hurried_ends_with_what_its_silos_have(self, harness, prepared, tmp_path, ahead):
        inner = {"local_steps": 40_000, "ahead_steps": ahead}
        job = smallest(prepared, tmp_path, "spec", inner=inner, rounds={"total": 2})
        pool, records = harness.make({}, tmp_path / "notes"), list[dict[str, Any]]()
        done = threading.Event()

        def hurry() -> None:
            while not done.is_set():
                if training := [silo.round for silo in pool.statuses().values() if silo.doing == "training"]:
                    pool.hand_in(max(training))
                time.sleep(0.1)

        hand = threading.Thread(target=hurry, daemon=True)
        hand.start()
        try:
            state = train(job, pool, RunStore(job), records.append, Control())
        finally:
            done.set()
            pool.close()
        hand.join()
        steps = [silo["steps"] for record in records[:2] for silo in record["silos"].values()]
        assert len(steps) == 6
        assert all(0 < each < 40_000 for each in steps)
        assert {n: s.tokens for n, s in state.silos.items()} == {n: s.position[n] * 16 for n, s in state.silos.items()}

    def test_who_asks_too_late_for_a_round_to_be_handed_in_cuts_no_other_short(self, harness, prepared, tmp_path):
        job = smallest(prepared, tmp_path, "spec", inner={"local_steps": 300}, rounds={"total": 3})
        pool, records = harness.make({}, tmp_path / "notes"), list[dict[str, Any]]()
        done, asked = threading.Event(), set[int]()

        def ask() -> None:
            while not done.wait(0.01):
                for silo in pool.statuses().values():
                    if silo.doing == "training" and silo.round:
                        asked.add(silo.round)
                        pool.hand_in(silo.round - 1)  # that of the round before

        hand = threading.Thread(target=ask, daemon=True)
        hand.start()
        try:
            train(job, pool, RunStore(job), records.append, Control())
            assert pool.run_round({}, lambda took_s: 1.0) == {}
        finally:
            done.set()
            pool.close()
        hand.join()
        assert asked, "nobody was seen training"
        assert {silo["steps"] for record in records[:3] for silo in record["silos"].values()} == {300}

    def test_the_ledger_says_where_the_time_went(self, harness, prepared, tmp_path):
        job = smallest(prepared, tmp_path, "spec", rounds={"total": 2, "score_every": 1})
        records = endure_once(harness, job, {}).rounds
        for record in records:
            for silo in record["silos"].values():
                assert set(silo["seconds"]) == {"load", "score", "train", "code", "save", "send", "wait"}
                assert min(silo["seconds"].values()) >= 0
            assert min(silo["seconds"]["wait"] for silo in record["silos"].values()) == 0
            assert all(sum(silo["seconds"].values()) <= record["seconds"] + 0.01 for silo in record["silos"].values())

    def test_what_keeps_a_silo_from_opening_comes_back_as_our_own_error(self, harness, prepared, tmp_path):
        job = smallest(prepared, tmp_path, "spec", inner={"batch_size": 4096})
        with pytest.raises(SiloError, match=r"fewer than one batch \(inner\.batch_size = 4096\)"):
            endure_once(harness, job, {})

    def test_resume_is_exact_though_a_silo_joined_and_another_left_between_the_halves(
        self, harness, prepared, tmp_path
    ):
        """Stopped, and gone on with on `LocalPool`: a run may change its place."""
        overrides = {
            "rounds": {"total": 6, "keep": 9}, "inner": {"optimizer_state": "keep"},
            "model": {"width": 96},  # a body larger than what Ray sends inside a call
        }  # fmt: skip
        first, second = {1: [{"add": newcomer(prepared)}], 2: [{"drop": "code"}]}, {4: [{"return": "code"}]}
        here = Harness(lambda plan, notes: LocalPool())
        job = smallest(prepared, tmp_path / "halves", "trim", **overrides)
        endure_once(harness, job, {}, first, stop_after=3)
        halves = endure_once(here, job, {}, second)
        joined = next(r["round"] for r in halves.rounds if NEWCOMER in r["silos"])
        asks = {2: first[2], **second}
        asks[joined - 1] = [*first[1], *asks.get(joined - 1, [])]  # its text takes a moment to prepare on a cluster
        whole = endure_once(here, smallest(prepared, tmp_path / "whole", "trim", **overrides), {}, asks)
        assert all(torch.equal(halves.state.tensors[n], tensor) for n, tensor in whole.state.tensors.items())
        assert [sorted(r["silos"]) for r in halves.rounds] == [sorted(r["silos"]) for r in whole.rounds]
