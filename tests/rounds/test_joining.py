"""Silos join, leave and return: a newcomer stands where a veteran stands, and who returns goes on from where it was."""

import pytest
import torch
from faults import Recording, TracedPool
from lives import run
from ordeals import NEWCOMER, comparable, newcomer, smallest
from tiny import SOURCES

from dept_ray.draws import fingerprint_of
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.folder import load_round, run_folder
from dept_ray.rounds.methods import METHODS
from dept_ray.silo.snapshot import load_snapshot, silo_folder

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


def test_all_silos_of_a_round_start_from_the_body_that_the_folder_holds(prepared, tmp_path):
    job = smallest(prepared, tmp_path / "run", "spec", rounds={"total": 4, "keep": 9})
    pool = TracedPool()
    run(job, pool=pool, asks={2: [{"add": newcomer(prepared)}]})
    for round in range(4):
        told = {order.fingerprint for (at, _, _), order in pool.orders.items() if at == round}
        assert len(told) == 1
        if round:
            assert told == {fingerprint_of(load_round(run_folder(job), round)[0].body.numpy())}
