"""A run whose deltas and steps are rounded: every body is the same, nothing is lost, little is sent."""

import itertools
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from faults import Faults
from lives import endure, relive
from ordeals import compare, smallest

from dept_ray.codec import Moves, coded_bytes, encode
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import Log
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import Move, RunState, shared_body
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.snapshot import load_snapshot, silo_folder

LOSSY = ["bf16", "int8", "int4"]


class Watched(LocalPool):
    """Keeps the orders, and what every silo then holds."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[RoundOrder] = []
        self.held: list[dict[str, Any]] = []

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        answers = super().run_round(orders, deadline, meanwhile)
        self.orders += orders.values()
        self.held.append({name: {k: v.copy() for k, v in self.silos[name]._wire._held.items()} for name in orders})
        return answers


def run(job, pool=None, stop_after: int | None = None) -> tuple[RunState, list[dict[str, Any]], Watched]:
    control, records, pool = Control(), list[dict[str, Any]](), pool or Watched()

    def watch(record: dict[str, Any]) -> None:
        if record["round"] == stop_after:
            control.stop()

    state = train(job, pool, RunStore(job), Log(records.append, watch), control)
    pool.close()
    return state, records, pool


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("method", ["glob", "trim", "spec-opt"])
def test_every_silo_holds_the_coordinator_s_vectors_to_the_bit(tiny, method, codec):
    job = tiny(method, wire={"codec": codec}, rounds={"total": 3})
    state, _, pool = run(job)
    assert all(isinstance(order.body, Moves) for order in pool.orders)  # also of the first round: all draw the same
    assert {order.round for order in pool.orders} == {0, 1, 2, 3}
    assert len({(order.round, id(order.body)) for order in pool.orders}) == 4  # one for all: a pool sends it once
    assert state.body is not None
    for name, held in pool.held[-1].items():
        assert np.array_equal(held["body"], state.body.numpy()), name
        if state.rows is not None:
            card, size = pool.cards[name], pool.cards[name].global_vocabulary_size
            ids = np.arange(size) if card.owned_rows is None else card.owned_rows
            rows = state.rows.numpy()[np.concatenate([ids, np.arange(size, len(state.rows))])]
            assert np.array_equal(held["rows"], rows), name


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("method", ["glob", "trim", "spec", "spec-opt"])
def test_stopped_and_resumed_equals_uninterrupted(tiny, method, codec):
    changes = {"wire": {"codec": codec}, "rounds": {"total": 4, "choose": 2}, "outer": {"preset": "nesterov"}}
    expected, records, _ = run(tiny(method, at="whole", **changes))
    job = tiny(method, at="halves", **changes)
    _, first, _ = run(job, stop_after=2)
    state, second, _ = run(job)
    assert {f"{what}_residual" for what in ("body", "rows") if f"{what}" in expected.tensors} < set(expected.tensors)
    assert state.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert [r.get("loss") for r in first + second] == [r.get("loss") for r in records]
    assert [r.get("scores") for r in first + second] == [r.get("scores") for r in records]


@pytest.mark.parametrize("method", ["trim", "spec-opt"])
def test_packed_a_run_has_the_same_bits_and_sends_less(tiny, method):
    changes = {"rounds": {"total": 3, "choose": 2}, "inner": {"ahead_steps": 1}}
    plain, records, _ = run(tiny(method, at="plain", wire={"codec": "int4"}, **changes))
    job = tiny(method, at="packed", wire={"codec": "int4-zstd"}, **changes)
    run(job, stop_after=1)
    packed, others, _ = run(job)
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in plain.tensors.items())
    sent, less = (record["sent_bytes"] for record in (records[-2], others[-2]))
    assert 0.8 < less["up"] / sent["up"] < 1, "the fewer steps, the more alike in size what they moved"


@pytest.mark.parametrize("codec", LOSSY)
def test_bytes_on_record_are_those_of_the_codec(tiny, codec):
    job = tiny("spec", wire={"codec": codec}, rounds={"total": 3})
    state, records, _ = run(job)
    assert state.body is not None
    each = coded_bytes(codec, tuple(state.body.shape))
    assert [record["sent_bytes"] for record in records[:-1]] == [
        {"down": 3 * (0 if record["round"] == 1 else each), "up": 3 * each} for record in records[:-1]
    ]


def test_who_missed_rounds_is_told_the_steps_between_and_a_newcomer_of_the_process_everything(tiny):
    job = tiny("spec", wire={"codec": "int4"}, rounds={"total": 6, "choose": 1})
    state, _, pool = run(job)
    chosen = [order for order in pool.orders if order.steps]
    told = [(order.silo, order.body.base, len(order.body.steps)) for order in chosen]  # pyright: ignore
    last: dict[str, int] = {}
    for round, (silo, base, steps) in enumerate(told):
        assert (base, steps) == (last.get(silo, 0), round - last.get(silo, 0))
        last[silo] = round
    again = Watched()
    _, _, again = run(job.model_copy(update={"rounds": job.rounds.model_copy(update={"total": 6})}), again)
    assert all(isinstance(order.body, np.ndarray) for order in again.orders)
    assert state.body is not None
    assert all(np.array_equal(order.body, state.body.numpy()) for order in again.orders)


def test_steps_are_kept_while_they_are_fewer_bytes_than_the_body():
    body = torch.zeros(6400)
    step, _ = encode(body.numpy(), "int4")
    state = RunState(9, {}, body, moves=tuple(Move(base, step, None) for base in range(2, 9)))
    told = [shared_body(state, holds) for holds in (-1, 0, 1, 2, 8, 9)]
    assert [len(each.steps) if isinstance(each, Moves) else None for each in told] == [None, None, None, 7, 1, 0]


def test_a_silo_whose_copy_rots_is_told_everything_and_goes_on(tiny):
    class Rotting(Watched):
        def run_round(self, orders, deadline, meanwhile=nothing):
            if orders["latin"].round == 1:
                self.silos["latin"]._wire._held["body"][7] += 1
            return super().run_round(orders, deadline, meanwhile)

    job = tiny("trim", wire={"codec": "int8"}, rounds={"total": 4})
    state, records, pool = run(job, Rotting())
    refused = [record["refused"] for record in records[:-1]]
    assert [list(each) for each in refused] == [[], ["latin"], [], []]
    assert "arrived altered" in refused[1]["latin"]
    told = {order.round: type(order.body) for order in pool.orders if order.silo == "latin"}
    assert told == {0: Moves, 1: Moves, 2: np.ndarray, 3: Moves, 4: Moves}
    assert state.silos["latin"].rounds == 3


def test_what_rounding_took_waits_in_the_silo_s_snapshot(tiny):
    job = tiny("trim", wire={"codec": "int4"}, rounds={"total": 2})
    state, _, pool = run(job)
    for name, record in state.silos.items():
        parts, _ = load_snapshot(silo_folder(job, name) / str(record.snapshot))
        residual = pool.silos[name]._wire.residual
        assert sorted(parts["residual"]) == ["body", "rows"]
        assert all(np.array_equal(parts["residual"][what].numpy(), residual[what]) for what in residual)
        assert any(parts["residual"]["body"].tolist())


def test_rows_that_nobody_reported_stand_still_also_when_they_are_owed_something(tiny):
    job = tiny("trim", wire={"codec": "int4"}, rounds={"total": 4, "choose": 1})
    states: list[RunState] = []
    pool, control = Watched(), Control()
    store = RunStore(job)
    save = store.save
    store.save = lambda state, *more: (states.append(state), save(state, *more))  # pyright: ignore
    train(job, pool, store, Log(), control)
    pool.close()
    for before, after in itertools.pairwise(states):
        (silo,) = (name for name in after.silos if after.silos[name].rounds > before.silos[name].rounds)
        assert before.rows is not None
        assert after.rows is not None
        assert before.rows_residual is not None
        assert after.rows_residual is not None
        others = np.ones(len(before.rows), bool)
        owned = pool.cards[silo].owned_rows
        others[owned] = False
        others[pool.cards[silo].global_vocabulary_size :] = False
        assert others.any()
        assert torch.equal(before.rows[others], after.rows[others])
        assert torch.equal(before.rows_residual[others], after.rows_residual[others])


def test_told_to_go_on_from_what_it_does_not_hold_a_silo_refuses_and_then_takes_everything(tiny):
    job = tiny("spec", wire={"codec": "int8"}, rounds={"total": 2})
    _, _, pool = run(job)
    name, order = "latin", pool.orders[-1]
    silo, body = pool.silos[name], pool.held[-1][name]["body"]
    take = silo._learner.vectors.take
    assert silo.status.holds == 2
    with pytest.raises(SiloError, match="told to go on from round 1, it holds 2"):
        silo._wire.receive(replace(order, body=Moves(body.shape, 1, ())), take)
    assert silo._wire.holds == -1
    whole = silo._wire.receive(replace(order, body=body), take)
    assert silo._wire.holds == order.round
    assert np.array_equal(whole["body"], body)
    with pytest.raises(SiloError, match="arrived altered"):
        silo._wire.receive(replace(order, body=body + 1), take)
    assert silo._wire.holds == -1


@pytest.mark.parametrize("codec", LOSSY)
def test_silos_that_die_lie_and_come_late_change_no_bit_of_what_is_owed(prepared, tmp_path, monkeypatch, codec):
    faults = Faults(
        dies_at={(0, 0, "code"): "after", (2, 0, "latin"): "within"},
        poisons_at={(1, 0, "latin"): "nan", (2, 0, "numbers"): "wrong shape"},
        late_at={(1, 0, "numbers"): 1},
        coordinator_dies_at={1: "before the manifest"},
    )
    change = {"rounds": {"total": 4}, "wire": {"codec": codec}, "faults": {"quorum": 0.3}}
    ordeal = endure(smallest(prepared, tmp_path / "a", "trim", **change), faults, monkeypatch)
    compare(ordeal, relive(ordeal, smallest(prepared, tmp_path / "b", "trim", **change), monkeypatch))


def test_an_order_for_one_who_holds_nothing_any_more_is_whole() -> None:
    """Where it is not known, as in a region that has the order from a letter, there is none."""
    whole = RoundOrder("tiny", "a", 3, 0, None, {}, 0, 1, False, body=np.zeros(4, np.float32))
    assert whole.from_nothing is whole
    moves = replace(whole, body=Moves((4,), 3, ()), whole=lambda order: whole)
    assert moves.from_nothing is whole
    assert moves.without_arrays().whole is None
    assert pickle.loads(pickle.dumps(moves)).whole is None
    assert replace(moves, whole=None).from_nothing is None
