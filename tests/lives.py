"""The lives of a run: one, with what people ask for meanwhile; as many as a plan of faults costs; and the reference.

`endure` trains a job under a plan (tests/faults.py), starting a new process's worth of objects (pool, store, control)
whenever the coordinator dies or the run ends with an error whose cause is then taken away.

`relive` trains the same job in the reference way: what was lost had simply not been chosen. It takes from the ledger of
the ordeal who counted in each round and with how many steps, and from the change records what people asked for when.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Faults, FaultyPool, Moment, TracedPool

from dept_ray.config import Job
from dept_ray.errors import QuorumLost, StoreError
from dept_ray.messages import Change, RoundOrder, SiloUpdate
from dept_ray.metrics import JsonLines, Log, read_records
from dept_ray.rounds import store as store_module
from dept_ray.rounds import train as train_module
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo import snapshot as snapshot_module

MAX_LIVES = 12


def run(
    job: Job,
    stop_after: int | None = None,
    pool: LocalPool | None = None,
    asks: Mapping[int, list[Change]] | None = None,
) -> tuple[RunState, list[dict[str, Any]]]:
    """One life: train with a new pool, store and control, as a new process would; the state, and the records on disk.

    `asks` are changes by the number of committed rounds.
    """
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


class CoordinatorDied(BaseException):
    """The process is gone: nobody catches it."""


@dataclass
class Ordeal:
    """What became of a run that was made to suffer."""

    job: Job
    state: RunState
    records: list[dict[str, Any]]
    lost: dict[Moment, str]
    reads: dict[Moment, list[str]]
    lives: int
    errors: list[Exception]
    asked: list[Change]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The records of committed rounds."""
        return [record for record in self.records if record["event"] == "round"]


def endure(job: Job, faults: Faults, patch: pytest.MonkeyPatch, remote: bool = False) -> Ordeal:
    """Train a job to its end under a plan, with a new pool and a new store for every life; see `FaultyPool`."""
    lost: dict[Moment, str] = {}
    reads: dict[Moment, list[str]] = {}
    errors: list[Exception] = []
    asked: list[Change] = []
    for life in range(1, MAX_LIVES):
        control, pool = Control(), FaultyPool(faults, lost, reads, remote)
        with patch.context() as here:
            try:
                store = RunStore(job)
                pool.round = max(store.rounds(), default=0)
                _injure(here, job, pool, faults)
                asked += _ask(control, faults, pool.round)
                state = train(job, pool, store, _log(store, pool, faults, control, asked), control)
            except CoordinatorDied:
                continue
            except QuorumLost as err:
                errors.append(err)
                faults.absent_at = {(r, name) for r, name in faults.absent_at if r != pool.round}
                faults.disk_full_at.pop(pool.round, None)
                continue
            except StoreError as err:  # the disk of the run folder: someone makes room
                if "No space left" not in str(err) or faults.disk_full_at.pop(pool.round, "") != "run":
                    raise
                errors.append(err)
                continue
            finally:
                pool.close()
        if control.stopping and (due := [round for round in faults.corrupts_at if round <= pool.round]):
            _corrupt(job, pool.round, faults.corrupts_at.pop(due[0]))
            continue
        return Ordeal(job, state, read_records(store.metrics), lost, reads, life, errors, asked)
    raise AssertionError(f"the run did not end within {MAX_LIVES} lives: {errors}")


def relive(ordeal: Ordeal, job: Job, patch: pytest.MonkeyPatch) -> Ordeal:
    """The reference run: only those are chosen who counted, and they train as many steps as counted."""
    rounds = {record["round"] - 1: record for record in ordeal.rounds}
    changes = [record for record in ordeal.records if record["event"] == "change" and "refused" not in record]
    control, store, pool = Control(), RunStore(job), _ReferencePool(rounds)

    def ask(round: int) -> None:
        for record in changes:
            if record["round"] == round:
                control.change(record["change"])

    def log(record: dict[str, Any]) -> None:
        JsonLines(store.metrics)(record)
        if record["event"] == "round":
            ask(record["round"])

    ask(0)
    with patch.context() as here:
        here.setattr(train_module, "choose", lambda job, present, round: sorted(rounds[round]["silos"]))
        try:
            state = train(job, pool, store, log, control)
        finally:
            pool.close()
    return Ordeal(job, state, read_records(store.metrics), {}, pool.reads, 1, [], [])


class _ReferencePool(TracedPool):
    """Each silo's text of a round ends after the steps that counted in the ordeal; nobody is asked to stop."""

    def __init__(self, rounds: dict[int, dict[str, Any]]) -> None:
        super().__init__()
        self.rounds = rounds

    def _limited(self, moment: Moment, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return islice(batches, self.rounds[moment[0]]["silos"][moment[2]]["steps"])


# ------------------------------------------------------------------------------------------------ the coordinator
def _ask(control: Control, faults: Faults, round: int) -> list[Change]:
    changes = faults.changes(round)
    for change in changes:
        control.change(change)
    return changes


def _log(
    store: RunStore, pool: FaultyPool, faults: Faults, control: Control, asked: list[Change]
) -> Callable[[dict[str, Any]], None]:
    lines = JsonLines(store.metrics)

    def log(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            how = faults.coordinator_dies_at.get(pool.round, "")
            if how in ("before the log line", "within the log line", "after the log line"):
                del faults.coordinator_dies_at[pool.round]
                line = {"before": "", "within": json.dumps(record)[:60]}.get(how.split()[0])
                with open(store.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n" if line is None else line)
                raise CoordinatorDied(how)
        lines(record)
        if record["event"] == "change" and faults.coordinator_dies_at.get(pool.round) == "after a change":
            raise CoordinatorDied(faults.coordinator_dies_at.pop(pool.round))
        if record["event"] == "round":
            faults.disk_full_at.pop(pool.round, None)
            pool.round = record["round"]
            asked.extend(_ask(control, faults, pool.round))
            if pool.round in faults.corrupts_at:
                control.stop()

    return log


def _injure(patch: pytest.MonkeyPatch, job: Job, pool: FaultyPool, faults: Faults) -> None:
    """Let the plan act where the coordinator orders and where files are written."""
    write, order = store_module.write_atomically, pool.run_round
    rounds = run_folder(job) / "rounds"

    def write_of_run(path: Path, data: Any) -> None:
        how = faults.coordinator_dies_at.get(pool.round, "") if path.is_relative_to(rounds) else ""
        before = how == "before any file" or (how == "before the manifest" and path.name == "manifest.json")
        if before:
            raise CoordinatorDied(faults.coordinator_dies_at.pop(pool.round))
        if path.is_relative_to(rounds) and faults.disk_full_at.get(pool.round) == "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    def write_of_silo(path: Path, data: Any) -> None:
        if faults.disk_full_at.get(pool.round) == path.parent.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    def run_round(
        orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        round, training = next(iter(orders.values())).round, any(order.steps for order in orders.values())
        how = faults.coordinator_dies_at.get(round, "") if training else ""
        if how == "before the orders":
            raise CoordinatorDied(faults.coordinator_dies_at.pop(round))
        answers = order(orders, deadline, meanwhile)
        if how == "before the outer step":
            raise CoordinatorDied(faults.coordinator_dies_at.pop(round))
        return answers

    patch.setattr(store_module, "write_atomically", write_of_run)
    patch.setattr(snapshot_module, "write_atomically", write_of_silo)
    patch.setattr(pool, "run_round", run_round)


def _corrupt(job: Job, round: int, how: str) -> None:
    """Damage the newest round; see that it is told, and how to go on; do so."""
    folder = run_folder(job) / "rounds" / f"{round:06d}"
    tensors = sorted(folder.glob("*.safetensors"))
    file = folder / "manifest.json" if how == "truncated manifest" or not tensors else tensors[0]
    blob = bytearray(file.read_bytes())
    if how == "missing tensor" and tensors:
        file.unlink()
    elif how == "altered tensor" and tensors:
        blob[-1] ^= 1
        file.write_bytes(blob)
    else:
        file.write_bytes(blob[: len(blob) // 2])
    pool = LocalPool()
    with pytest.raises(StoreError, match=rf"{file}.*restore it, or delete .*to go back a round"):
        train(job, pool, RunStore(job), lambda record: None, Control())
    pool.close()
    shutil.rmtree(folder)
