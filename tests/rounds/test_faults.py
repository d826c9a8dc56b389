"""Silos die, are late, lie, join and leave; the coordinator dies; disks fill up and files rot. What counts is the same.

Every ordeal is compared with a reference run in which what was lost had simply not been chosen (tests/faults.py).
"""

import gc
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import (
    COORDINATOR_DEATHS,
    CORRUPTIONS,
    DEATHS,
    POISONS,
    Faults,
    FaultyPool,
    Ordeal,
    TracedPool,
    endure,
    poisoned,
    relive,
)
from ordeals import NEWCOMER, comparable, compare, newcomer, smallest
from tiny import SOURCES, write_texts

from dept_ray.config import Job
from dept_ray.draws import fingerprint_of, generator
from dept_ray.errors import QuorumLost, SiloError
from dept_ray.messages import Change, RoundOrder, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import JsonLines, Log, read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import load_round, run_folder
from dept_ray.rounds.methods import METHODS, MIXTURE
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.snapshot import load_snapshot, silo_folder

# ------------------------------------------------------------------------------------------------ random ordeals


def plan(seed: int, method: str, prepared: Path, rounds: int) -> tuple[Faults, dict[str, Any]]:
    """One to six faults, and a job for them to happen to."""
    draw = generator("ordeal", seed)
    mixed, shares = METHODS[method].mixed, METHODS[method].share_body
    silos = (MIXTURE,) if mixed else SOURCES

    def one_of(values: Any) -> Any:
        return values[int(draw.integers(len(values)))]

    def a_round() -> int:
        return int(draw.integers(rounds))

    def a_moment() -> tuple[int, int, str]:
        return a_round(), int(draw.integers(4) == 0), one_of(silos if NEWCOMER not in joined else (*silos, NEWCOMER))

    joined: list[str] = []
    faults = Faults()
    job: dict[str, Any] = {
        "seed": seed,
        "rounds": {"total": rounds, "keep": one_of((2, 3))},
        "faults": {"quorum": one_of((0.3, 0.5, 1.0)), "newcomer_steps": one_of((0, 1, 5))},
        "inner": {"optimizer_state": one_of(("reset", "keep")), "ahead_steps": (0, 0, 1, 2)[seed // 5 % 4]},
        "outer": {"preset": one_of(("average", "nesterov")), "rows_momentum": one_of((0.0, 0.5))},
        "wire": {"codec": ("fp32", "fp32", "bf16", "int8", "int4")[seed % 5]},
    }
    if not mixed and draw.integers(3) == 0:
        job["rounds"]["choose"] = 2
    for _ in range(int(draw.integers(1, 7))):
        match one_of(("die", "late", "poison", "raise", "absent", "people", "coordinator", "disk", "corrupt")):
            case "die":
                faults.dies_at[a_moment()] = one_of(DEATHS)
            case "late":
                faults.late_at[a_moment()] = one_of((0, 1, None))
            case "poison":
                faults.poisons_at[a_moment()] = one_of([*POISONS, "noise", "hundredfold"])
            case "raise":
                faults.raises_at.add(a_moment())
            case "absent":
                faults.absent_at.add((a_round(), one_of(silos)))
            case "people" if not mixed and draw.integers(3):
                if not joined and draw.integers(2):
                    faults.joins_at[a_round()] = newcomer(prepared)
                    joined.append(NEWCOMER)
                else:
                    left = a_round()
                    name = one_of(silos)
                    faults.drops_at[left] = name
                    faults.returns_at[left + 1 + int(draw.integers(2))] = name
            case "people":
                faults.sets_at[a_round()] = one_of(
                    (("outer.lr", 0.5), ("inner.lr", 3e-3), ("inner.local_steps", 1), ("rounds.score_every", 1))
                    if shares
                    else (("inner.lr", 3e-3), ("inner.local_steps", 3))
                )
            case "coordinator":
                faults.coordinator_dies_at[a_round()] = one_of(COORDINATOR_DEATHS)
            case "disk":
                faults.disk_full_at[a_round()] = one_of(("run", *silos))
            case "corrupt":
                faults.corrupts_at[1 + a_round()] = one_of(CORRUPTIONS)
    return faults, job


PER_METHOD, BATCHES = 44, 4


@pytest.mark.parametrize("batch", [0, 1, *(pytest.param(batch, marks=pytest.mark.soak) for batch in (2, 3))])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_was_lost_had_simply_not_been_chosen(prepared, tmp_path, monkeypatch, method, batch):
    """44 ordeals of each of seven methods: 308 in all. In half of them silos run ahead of the commit; in about as many
    of those with a shared body they also make steps ahead of their orders, and the reference run makes none early."""
    for number in range(batch, PER_METHOD, BATCHES):
        seed = 1000 * METHOD_NAMES.index(method) + number
        faults, overrides = plan(seed, method, prepared, rounds=3 + number % 2)
        told = f"seed {seed}: {faults}"
        try:
            job = smallest(prepared, tmp_path / f"{seed}", method, **overrides)
            ordeal = endure(job, faults, monkeypatch, remote=bool(number // BATCHES % 2))
            same = smallest(prepared, tmp_path / f"{seed}-r", method, **overrides)
            compare(ordeal, relive(ordeal, same, monkeypatch))
        except BaseException as err:
            err.add_note(told)
            raise
        shutil.rmtree(tmp_path / f"{seed}")
        shutil.rmtree(tmp_path / f"{seed}-r")


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


def run(job: Job, stop_after: int | None = None, pool: LocalPool | None = None,
        asks: Mapping[int, list[Change]] | None = None) -> tuple[RunState, list[dict[str, Any]]]:  # fmt: skip
    """Train with a new store and control; `asks` are changes by the number of committed rounds."""
    store, control, pool, asks = RunStore(job), Control(), pool or LocalPool(), asks or {}

    def watch(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            for change in asks.get(record["round"], []):
                control.change(change)
            if record["round"] == stop_after:
                control.stop()

    for change in asks.get(max(store.rounds(), default=0), []):
        control.change(change)
    try:
        state = train(job, pool, store, Log(JsonLines(store.metrics), watch), control)
    finally:
        pool.close()
    return state, read_records(store.metrics)


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


# ------------------------------------------------------------------------------------------------ joining and leaving

SEVERAL = [name for name in METHOD_NAMES if not METHODS[name].mixed]


@pytest.mark.parametrize("method", SEVERAL)
def test_resume_is_exact_when_a_silo_joined_and_another_left_between_the_halves(prepared, tmp_path, method):
    job = {"rounds": {"total": 5, "keep": 9}, "inner": {"optimizer_state": "keep"}, "outer": {"preset": "nesterov"}}
    first = {1: [{"add": newcomer(prepared)}, {"drop": "code"}]}
    second = {3: [{"return": "code"}, {"drop": "latin"}]}
    state, records = run(smallest(prepared, tmp_path / "whole", method, **job), asks=first | second)
    halves = smallest(prepared, tmp_path / "halves", method, **job)
    run(halves, stop_after=2, asks=first)
    resumed, resumed_records = run(halves, asks=second)
    assert resumed.silos == state.silos
    assert resumed.changes == state.changes
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert comparable(resumed_records) == comparable(records)
    present = [sorted(r["silos"]) for r in records if r["event"] == "round"]
    assert present == [list(SOURCES), *[sorted([NEWCOMER, "latin", "numbers"])] * 2,
                       *[sorted([NEWCOMER, "code", "numbers"])] * 2]  # fmt: skip
    assert state.silos["code"].position == {"code": 2 * 2 * 3}


@pytest.mark.parametrize("method", ["trim", "spec-opt"])
def test_a_newcomer_stands_where_a_veteran_stands(prepared, tmp_path, method):
    pool = TracedPool()
    job = smallest(prepared, tmp_path / "run", method, rounds={"total": 4}, faults={"newcomer_steps": 1})
    state, records = run(job, pool=pool, asks={2: [{"add": newcomer(prepared)}]})
    mine, theirs = pool.orders[2, 0, NEWCOMER], pool.orders[2, 0, "latin"]
    assert mine.body is theirs.body
    same = ("run", "round", "attempt", "first_step", "steps", "total_steps", "lr", "fingerprint")
    assert [getattr(mine, key) for key in same] == [getattr(theirs, key) for key in same]
    assert (mine.first_step, mine.frozen_steps, theirs.frozen_steps) == (4, 1, 0)
    assert (mine.after, mine.position) == (None, {NEWCOMER: 0})
    assert pool.orders[3, 0, NEWCOMER].frozen_steps == 0
    for record in records[:2]:
        assert NEWCOMER not in record["silos"]
    assert state.silos[NEWCOMER].rounds == 2
    rates = [[group.lr for group in pool.silos[name]._learner.optimizer.groups] for name in (NEWCOMER, "latin")]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(("frozen", "moved"), [(1, True), (2, False), (5, False)])
def test_a_newcomer_s_body_stands_still_for_its_first_steps(prepared, tmp_path, frozen, moved):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 3}, faults={"newcomer_steps": frozen})
    pool = Recording()
    run(job, pool=pool, asks={1: [{"add": newcomer(prepared)}]})
    first, second = pool.updates[1, NEWCOMER], pool.updates[2, NEWCOMER]
    assert bool(first.body.any()) == moved
    assert second.body.any()
    assert first.tokens == 64
    held = load_snapshot(silo_folder(job, NEWCOMER) / "000001-0-0")[0]["embedding"]["tokens"]
    after = load_snapshot(silo_folder(job, NEWCOMER) / "000002-0-0")[0]["embedding"]["tokens"]
    assert not torch.equal(held, after)


class Recording(LocalPool):
    """Keeps the answers by round and silo; may bend them."""

    def __init__(self, liar: str = "", how: str = "", absent: str = "") -> None:
        super().__init__()
        self.updates: dict[tuple[int, str], SiloUpdate] = {}
        self.liar, self.how, self.absent = liar, how, absent

    def ready(self) -> set[str]:
        return super().ready() - {self.absent}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        answers = super().run_round(orders, deadline, meanwhile)
        for name, answer in answers.items():
            if isinstance(answer, SiloUpdate) and answer.tokens:
                self.updates[answer.round, name] = answer
                if name == self.liar:
                    answers[name] = poisoned(answer, self.how)
        return answers


def test_a_majority_of_newcomers_whose_body_stands_still_does_not_outvote_a_veteran(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 3}, faults={"newcomer_steps": 9})
    joining = [{"add": newcomer(prepared, name)} for name in ("d1", "d2", "d3")]
    leaving = [{"drop": "code"}, {"drop": "numbers"}]
    _, records = run(job, asks={1: [*joining, *leaving]})
    second = [r for r in records if r["event"] == "round"][1]
    assert (sorted(second["silos"]), second["refused"]) == (["d1", "d2", "d3", "latin"], {})


@pytest.mark.parametrize("method", ["spec-opt", "isolated"])
def test_who_returns_goes_on_from_its_own_snapshot_and_position(prepared, tmp_path, method):
    job = smallest(prepared, tmp_path / "run", method, rounds={"total": 4}, inner={"optimizer_state": "keep"})
    pool = TracedPool()
    state, records = run(job, pool=pool, asks={1: [{"drop": "latin"}], 3: [{"return": "latin"}]})
    assert [r["away"] for r in records if r["event"] == "round"] == [{}, {"latin": "dropped"}, {"latin": "dropped"}, {}]
    order = pool.orders[3, 0, "latin"]
    assert (order.after, order.position, order.first_step) == ("000000-0-0", {"latin": 4}, 6)
    assert (state.silos["latin"].position, state.silos["latin"].rounds) == ({"latin": 8}, 2)


def test_who_was_dropped_before_it_was_ready_may_return(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec")
    asks = {1: [{"add": newcomer(prepared)}, {"drop": NEWCOMER}], 2: [{"return": NEWCOMER}]}
    state, records = run(job, asks=asks)
    assert [NEWCOMER in r["silos"] for r in records if r["event"] == "round"] == [False, False, True]
    assert state.silos[NEWCOMER].position == {NEWCOMER: 4}


# ------------------------------------------------------------------------------------------------ liars

LIARS_JOB: dict[str, Any] = {
    "rounds": {"total": 5, "score_every": 0},
    "inner": {"local_steps": 8, "batch_size": 4, "context": 32},
    "model": {"layers": 1, "width": 32, "heads": 2},
}


def losses(records: list[dict[str, Any]]) -> dict[str, float]:
    return {source: records[-1]["scores"][source]["loss"] for source in SOURCES}


@pytest.fixture(scope="module")
def without_the_liar(prepared, tmp_path_factory):
    """By method: the others' final losses in a run in which the fourth silo was never there."""
    found: dict[str, dict[str, float]] = {}

    def of(method: str) -> dict[str, float]:
        if method not in found:
            job = liars_job(prepared, tmp_path_factory.mktemp("honest") / "run", method)
            found[method] = losses(run(job, pool=Recording(absent=NEWCOMER))[1])
        return found[method]

    return of


def liars_job(prepared: Path, folder: Path, method: str, **faults: Any) -> Job:
    sources = [*write_texts(prepared / "text"), newcomer(prepared)]
    return smallest(prepared, folder, method, **LIARS_JOB, sources=sources, faults={"failures": 99, **faults})


@pytest.mark.parametrize("how", ["nan", "noise", "hundredfold"])
@pytest.mark.parametrize("method", ["spec-opt", "trim"])
def test_a_liar_who_is_refused_changes_nothing(prepared, tmp_path, without_the_liar, method, how):
    job = liars_job(prepared, tmp_path / "run", method)
    _, records = run(job, pool=Recording(liar=NEWCOMER, how=how))
    assert [sorted(r["refused"]) for r in records if r["event"] == "round"] == [[NEWCOMER]] * 5
    assert losses(records) == without_the_liar(method)


CLIPPED = [
    ("spec-opt", "noise", 0.05), ("spec-opt", "hundredfold", 0.05),
    ("trim", "noise", 0.25), ("trim", "hundredfold", 0.25),
]  # fmt: skip


@pytest.mark.parametrize(("method", "how", "bound"), CLIPPED)
def test_a_liar_who_is_clipped_does_about_as_much_as_one_more_silo(
    prepared, tmp_path, without_the_liar, method, how, bound
):
    """Clipping does not keep the 1 % that refusing keeps: what is scaled still counts. It changes the others' losses by
    (in per cent; one honest silo more: +0.6 to +3.1 under spec-opt, -2.4 to +11.5 under trim)
    noise -0.1 to +2.2 and +6.7 to +11.0, hundredfold +0.5 to +3.0 and -2.7 to +12.8.
    Scaled to the limit of ten medians instead of the median it would be +3 to +96."""
    job = liars_job(prepared, tmp_path / "run", method, norm_policy="clip")
    _, records = run(job, pool=Recording(liar=NEWCOMER, how=how))
    expected, found = without_the_liar(method), losses(records)
    changed = {name: found[name] / expected[name] - 1 for name in SOURCES}
    assert all(record["refused"] == {} for record in records)
    assert all(abs(change) < bound for change in changed.values()), changed


@pytest.mark.parametrize(("method", "bound"), [("spec-opt", 0.05), ("trim", 0.25)])
def test_noise_of_an_honest_size_counts_and_does_about_as_much_as_one_more_silo(
    prepared, tmp_path, without_the_liar, method, bound
):
    """Nothing tells it from a silo whose text is unlike the others'. It changes their losses by (in per cent)
    -0.1 to +2.4 under spec-opt and +6.7 to +11.0 under trim; one honest silo more by what the test above says."""
    _, records = run(liars_job(prepared, tmp_path / "run", method), pool=Recording(liar=NEWCOMER, how="quiet noise"))
    expected, found = without_the_liar(method), losses(records)
    assert all(record["refused"] == {} for record in records)
    assert all(abs(found[name] / expected[name] - 1) < bound for name in SOURCES), found


def test_noise_beyond_what_fp32_can_square_is_refused_too(prepared, tmp_path):
    class Absurd(Recording):
        def run_round(
            self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
        ) -> dict[str, SiloUpdate | Exception]:
            answers = super().run_round(orders, deadline, meanwhile)
            answer = answers.get("latin")
            if isinstance(answer, SiloUpdate) and answer.body is not None:
                answers["latin"] = replace(answer, body=np.full_like(answer.body, 1e30))
            return answers

    for policy in ("refuse", "clip"):
        job = smallest(prepared, tmp_path / policy, "spec", rounds={"total": 1}, faults={"norm_policy": policy})
        state, records = run(job, pool=Absurd())
        assert ("latin" in records[0]["refused"]) == (policy == "refuse")
        assert torch.isfinite(state.body).all()
        assert state.body.abs().max() < 10


# ------------------------------------------------------------------------------------------------ over many rounds


def test_all_silos_of_a_round_start_from_the_body_that_the_folder_holds(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 4, "keep": 9})
    pool = TracedPool()
    run(job, pool=pool, asks={2: [{"add": newcomer(prepared)}]})
    for round in range(4):
        told = {order.fingerprint for (at, _, _), order in pool.orders.items() if at == round}
        assert len(told) == 1
        if round:
            assert told == {fingerprint_of(load_round(run_folder(job), round)[0].body.numpy())}


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
