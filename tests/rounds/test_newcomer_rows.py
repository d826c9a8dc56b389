"""Where embeddings stay home, a silo that joins begins from the rows of those who live where it lives, of no others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import JsonLines, Log, read_records
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.warmstart import WAYS

NEWCOMER = "numbers"


class Listening(LocalPool):
    """Keeps the orders."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[RoundOrder] = []

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self.orders += orders.values()
        return super().run_round(orders, deadline, meanwhile)


def joining(tiny: Any, method: str = "spec-opt", at: str = "run", storage: Mapping[str, Path] | None = None,
            way: str = "overlap", rounds: int = 4, stops: bool = False) -> tuple[Job, Listening, RunState]:  # fmt: skip
    """A run of two silos that a third joins after the second round."""
    sources = [s.model_dump(mode="json", exclude_unset=True) for s in tiny(method, "plain").sources]
    for source in sources:
        if source["name"] in (storage or {}):
            source["storage"] = str(storage[source["name"]])
    newcomer = sources.pop()
    assert newcomer["name"] == NEWCOMER
    job = tiny(method, at, sources=sources, faults={"newcomer_rows": way}, rounds={"total": rounds})
    pool, control, store = Listening(), Control(), RunStore(job)

    def follow(record: Mapping[str, Any]) -> None:
        if record["event"] == "round" and record["round"] == 2:
            control.change({"add": newcomer})
        if stops and record["event"] == "round":
            control.stop()

    state = None
    while state is None or state.round < rounds:
        pool, seen, control = Listening(), pool.orders, Control()
        store = RunStore(job)
        store.hold()
        prepare(job, local=True)
        try:
            state = train(job, pool, store, Log(JsonLines(store.metrics), follow), control)
        finally:
            pool.close()
            store.let_go()
        pool.orders = [*seen, *pool.orders]
    return job, pool, state


def first_bits(job: Job) -> float:
    """What the newcomer's model is worth before it has trained."""
    records = read_records(RunStore(job).metrics)
    return next(r["scores"][NEWCOMER]["bits_per_byte"] for r in records if NEWCOMER in r.get("scores", {}))


def donors(pool: Listening) -> list[dict[str, str]]:
    """Of each order to the newcomer."""
    return [order.donors for order in pool.orders if order.silo == NEWCOMER]


def test_every_way_is_another_beginning(tiny):
    bits = set()
    for way in ("random", *WAYS):
        job, pool, _ = joining(tiny, at=way, way=way, rounds=3)
        bits.add(first_bits(job))
        assert donors(pool)[0].keys() == (set() if way == "random" else {"code", "latin"})
    assert len(bits) == 4


def test_of_a_silo_that_lives_elsewhere_nothing_is_read(tiny, tmp_path):
    _, pool, _ = joining(tiny, at="one", storage={"code": tmp_path / "far"}, rounds=3)
    assert donors(pool)[0].keys() == {"latin"}
    _, pool, _ = joining(tiny, at="all", storage={NEWCOMER: tmp_path / "away"}, rounds=3)
    assert not any(donors(pool))


@pytest.mark.parametrize("method", ["trim", "glob"])
def test_where_rows_are_shared_a_newcomer_has_them_anyway(tiny, method: str):
    assert not any(donors(joining(tiny, method, rounds=3)[1]))


def test_a_run_that_stops_while_somebody_joins_goes_on_to_the_bit(tiny):
    (_, pool, whole), (*_, stopped) = (joining(tiny, "spec", str(stops), stops=stops) for stops in (False, True))
    assert torch.equal(whole.body, stopped.body)
    assert {name: silo.rounds for name, silo in whole.silos.items()} == {"code": 4, "latin": 4, NEWCOMER: 2}
    once, *later = donors(pool)
    assert once.keys() == {"code", "latin"}
    assert not any(later), "from then on its rows are its own"
    assert not any(order.donors for order in pool.orders if order.silo != NEWCOMER)


def test_behind_a_mailbox_it_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r'faults\.newcomer_rows = "ofa": behind a mailbox nobody knows'):
        tiny("spec-opt", faults={"newcomer_rows": "ofa"}, regions={"mailbox": str(tmp_path / "mail")})
