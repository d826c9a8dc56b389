"""Silos die, are late, lie or always fail; the coordinator dies; disks fill up and files rot. What counts is the same.

Every ordeal is compared with a reference run in which what was lost had simply not been chosen (tests/lives.py).
"""

import gc
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import COORDINATOR_DEATHS, CORRUPTIONS, DEATHS, POISONS, Faults, FaultyPool
from lives import Ordeal, endure, relive, run
from ordeals import compare, smallest
from tiny import SOURCES

from dept_ray.errors import QuorumLost, SiloError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.rounds.folder import run_folder
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.silo.snapshot import silo_folder

# ------------------------------------------------------------------------------------------------ one fault at a time


def ordeal_of(
    prepared: Path, folder: Path, method: str, plan: Faults, /, remote: bool = False, **overrides: Any
) -> Ordeal:
    """One ordeal, compared with its reference."""
    with pytest.MonkeyPatch.context() as patch:
        ordeal = endure(smallest(prepared, folder / "ordeal", method, **overrides), plan, patch, remote)
        compare(ordeal, relive(ordeal, smallest(prepared, folder / "reference", method, **overrides), patch))
    return ordeal


@pytest.mark.parametrize("how", COORDINATOR_DEATHS)
@pytest.mark.parametrize(
    ("method", "remote"), [("trim", True), ("spec-opt", False), ("spec-opt", True), ("act", False)]
)
def test_the_coordinator_dies_and_nothing_is_lost(prepared, tmp_path, method, remote, how):
    late = remote and how == "after a change"  # asked for while silos train the next round already
    faults = Faults(coordinator_dies_at={1 + late: how}, sets_at={1: ("inner.lr", 3e-3)})
    assert ordeal_of(prepared, tmp_path, method, faults, remote, inner={"optimizer_state": "keep"}).lives == 2
    assert not faults.coordinator_dies_at


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("method", ["glob", "spec"])
def test_a_silo_dies_and_the_round_goes_on_with_the_others(prepared, tmp_path, method, how):
    ordeal = ordeal_of(prepared, tmp_path, method, Faults(dies_at={(1, 0, "latin"): how}))
    first, second, third = ordeal.rounds
    assert sorted(second["silos"]) == ["code", "numbers"]
    assert "ActorDied" in second["refused"]["latin"]
    assert sorted(first["silos"]) == sorted(third["silos"]) == list(SOURCES)
    assert ordeal.state.silos["latin"].rounds == 2


def test_a_quorum_of_all_makes_the_round_again_and_its_text_counts_once(prepared, tmp_path):
    faults = Faults(dies_at={(1, 0, "latin"): "after"}, raises_at={(1, 1, "code")})
    ordeal = ordeal_of(prepared, tmp_path, "spec", faults, faults={"quorum": 1.0})
    assert [record["attempt"] for record in ordeal.rounds] == [0, 2, 0]
    assert {silo.rounds for silo in ordeal.state.silos.values()} == {3}
    assert [silo.snapshot for silo in ordeal.state.silos.values()] == ["000002-0-0"] * 3


def test_the_late_are_weighed_by_what_they_trained_and_go_on_from_there(prepared, tmp_path):
    ordeal = ordeal_of(prepared, tmp_path, "trim", Faults(late_at={(0, 0, "code"): 1, (1, 0, "numbers"): None}))
    first, second, _ = ordeal.rounds
    assert {name: silo["tokens"] for name, silo in first["silos"].items()} == {"code": 32, "latin": 64, "numbers": 64}
    assert second["refused"] == {"numbers": "no answer"}
    assert ordeal.state.silos["code"].position == {"code": 2 * (1 + 2 + 2)}


@pytest.mark.parametrize("how", POISONS)
@pytest.mark.parametrize("method", ["glob", "spec-opt"])
def test_a_lie_is_refused_and_its_reason_is_on_record(prepared, tmp_path, method, how):
    ordeal = ordeal_of(prepared, tmp_path, method, Faults(poisons_at={(1, 0, "latin"): how}))
    assert re.search(POISONS[how], ordeal.rounds[1]["refused"]["latin"])
    assert sorted(ordeal.rounds[2]["silos"]) == list(SOURCES)


@pytest.mark.parametrize("where", ["run", "latin"])
def test_a_full_disk_is_told_and_nothing_is_lost(prepared, tmp_path, where):
    ordeal = ordeal_of(prepared, tmp_path, "spec-opt", Faults(disk_full_at={1: where}))
    if where == "run":
        assert re.search(r"round 2 cannot be written.*No space left.*round 1 stands", str(ordeal.errors[0]))
    else:
        assert re.search(
            r"StoreError.*latin/000001-0-0 cannot be written.*No space", ordeal.rounds[1]["refused"]["latin"]
        )
    assert ordeal.lives == 1 + (where == "run")


@pytest.mark.parametrize("how", CORRUPTIONS)
@pytest.mark.parametrize(("method", "round"), [("trim", 1), ("trim", 2), ("spec-opt", 3), ("isolated", 2)])
def test_a_damaged_round_is_told_and_its_remedy_goes_back_one(prepared, tmp_path, method, round, how):
    inner = {"optimizer_state": "keep"}
    assert ordeal_of(prepared, tmp_path, method, Faults(corrupts_at={round: how}), inner=inner).lives == 2


def test_going_back_works_however_many_attempts_were_lost(prepared, tmp_path):
    """Snapshots of lost attempts do not push those that a manifest names out of what is kept."""
    raising = {(round, attempt, "code") for round in range(5) for attempt in range(4)}
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 5, "keep": 4},
                   faults={"quorum": 1.0, "attempts": 5, "failures": 99})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        ordeal = endure(job, Faults(raises_at=raising), patch)
        assert [record["attempt"] for record in ordeal.rounds] == [4] * 5
        for round in (5, 4, 3):
            shutil.rmtree(run_folder(job) / "rounds" / f"{round:06d}")
        again = endure(job, Faults(), patch)
    assert torch.equal(again.state.body, ordeal.state.body)


def test_a_damaged_snapshot_is_told_and_is_never_a_cold_start(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec-opt", faults={"failures": 2, "quorum": 0.5})
    whole = smallest(prepared, tmp_path / "whole", "spec-opt")
    with pytest.MonkeyPatch.context() as patch:
        expected = endure(whole, Faults(), patch)
        run(job, stop_after=1)
        file = silo_folder(job, "latin") / "000000-0-0" / "embedding.safetensors"
        blob = file.read_bytes()
        file.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
        _, records = run(job, stop_after=2)
        assert re.search(rf"{file} was altered: restore it", records[-1]["refused"]["latin"])
        file.write_bytes(blob)  # the remedy: one deletes the round that went on without it, and runs again
        shutil.rmtree(run_folder(job) / "rounds" / "000002")
        state, _ = run(job)
    assert torch.equal(state.body, expected.state.body)
    assert state.silos == expected.state.silos


# ------------------------------------------------------------------------------------------------ who always fails


class Refusing(LocalPool):
    """Some silos raise whatever they are told."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.asked = names, list[tuple[int, int, str]]()

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self.asked += [(o.round, o.attempt, name) for name, o in orders.items() if o.steps and name in self.names]
        answers = super().run_round(
            {k: order for k, order in orders.items() if k not in self.names}, deadline, meanwhile
        )
        return answers | {name: SiloError("the fan is broken") for name in orders if name in self.names}


def test_who_always_fails_is_set_aside_with_its_reason_and_the_run_goes_on(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 5}, faults={"failures": 2})
    state, records = run(job, pool=(pool := Refusing("latin")))
    assert pool.asked == [(0, 0, "latin"), (1, 0, "latin")]
    told = "set aside after 2 failures in a row, the last: SiloError: the fan is broken"
    assert [record["away"] for record in records[:5]] == [{}, *[{"latin": told}] * 4]
    assert state.silos["latin"].away == told
    assert state.silos["code"].rounds == 5


def test_who_was_set_aside_stays_so_over_a_resume_and_may_return(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 4}, faults={"failures": 1})
    run(job, stop_after=1, pool=Refusing("latin"))
    _, records = run(job, stop_after=2)
    assert "latin" not in records[-1]["silos"]
    state, records = run(job, asks={2: [{"return": "latin"}]})
    assert [("latin" in r["silos"]) for r in records if r["event"] == "round"] == [False, False, True, True]
    assert (state.silos["latin"].away, state.silos["latin"].rounds) == ("", 2)


def test_a_failure_now_and_then_is_forgiven(prepared, tmp_path):
    faults = Faults(raises_at={(round, 0, "code") for round in (0, 2, 4)})
    job = {"rounds": {"total": 6}, "faults": {"failures": 2}}
    assert ordeal_of(prepared, tmp_path, "spec", faults, **job).state.silos["code"].rounds == 3


def test_all_fail_and_the_run_ends_with_every_reason(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", faults={"failures": 3, "attempts": 9})
    pool = Refusing(*SOURCES)
    with pytest.raises(QuorumLost, match=r"round 1 has nobody left.*code: .*fan.*latin: .*fan.*numbers: .*fan"):
        run(job, pool=pool)
    assert len(pool.asked) == 9  # three silos, three failures each
    with pytest.raises(QuorumLost, match=r"round 1 failed 2 times"):
        run(smallest(prepared, tmp_path / "again", "spec", faults={"attempts": 2}), pool=Refusing(*SOURCES))
    state, _ = run(job)  # the fans are mended
    assert {silo.rounds for silo in state.silos.values()} == {3}


# ------------------------------------------------------------------------------------------------ over many rounds


def test_two_hundred_rounds_leave_nothing_behind(prepared, tmp_path):
    """Neither memory nor open files nor folders grow, though a silo dies now and then."""
    page, rounds = os.sysconf("SC_PAGE_SIZE"), 200
    seen: list[tuple[int, int, int]] = []

    class Watched(FaultyPool):
        def run_round(
            self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
        ) -> dict[str, SiloUpdate | Exception]:
            self.round = next(iter(orders.values())).round
            if self.round % 20 == 19:
                gc.collect()  # a silo and its stream know each other: the dead ones wait for the collector
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            folders = sum(1 for where in ("runs", "silos") for _ in (tmp_path / "run" / where).rglob("*"))
            seen.append((resident, len(os.listdir("/proc/self/fd")), folders))
            return super().run_round(orders, deadline, meanwhile)

    dying = {(round, 0, "latin"): "after" for round in range(5, rounds, 10)}
    job = smallest(prepared, tmp_path / "run", "spec", inner={"local_steps": 1}, rounds={"total": rounds})
    state, _ = run(job, pool=Watched(Faults(dies_at=dying), {}, {}))
    assert state.silos["latin"].rounds == rounds - 20
    middle, last = seen[60:100], seen[rounds - 40 : rounds]
    grown = (np.median(last, 0) - np.median(middle, 0)).tolist()
    assert grown[0] < 8 << 20, f"{grown[0] / 2**20:.1f} MiB in 100 rounds"
    assert min(row[1] for row in last) <= min(row[1] for row in middle)
    assert max(row[2] for row in last) <= max(row[2] for row in middle)
