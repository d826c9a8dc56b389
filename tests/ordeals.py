"""The smallest job there is, and what must be equal in a run that suffered or stopped and in its reference run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import TracedPool
from lives import Ordeal
from tiny import ready_job, write_texts

from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.rounds.changes import changed
from dept_ray.rounds.folder import load_round
from dept_ray.rounds.store import RunStore
from dept_ray.silo.snapshot import load_snapshot, silo_folder

NEWCOMER = "dialect"
SMALLEST: dict[str, Any] = {
    "model": {"layers": 1, "width": 16, "heads": 2},
    "inner": {"local_steps": 2, "batch_size": 2, "context": 16},
    "rounds": {"total": 3, "score_every": 0},
    "faults": {"attempts": 3, "failures": 9},
}


def smallest(prepared: Path, folder: Path, method: str, **overrides: Any) -> Job:
    changed = {key: {**SMALLEST[key], **overrides.pop(key, {})} for key in SMALLEST}
    folder.mkdir(parents=True, exist_ok=True)
    return ready_job(prepared, folder, method, **changed, **overrides)


def newcomer(prepared: Path, name: str = NEWCOMER) -> dict[str, Any]:
    """A fourth source: the text of `latin` under another name, in another order."""
    latin = next(t for t in write_texts(prepared / "text") if t["name"] == "latin")
    return {**latin, "name": name}


def lost_of(records: list[dict[str, Any]]) -> dict[tuple[int, int, str], str]:
    """Who was lost when, where chance or a clock decides it: what the ledger says, to be checked by other means."""
    return {
        (record["round"] - 1, each["attempt"], name): re.escape(reason)
        for record in records
        if record["event"] == "round"
        for each in (*record.get("failed", []), record)
        for name, reason in each["refused"].items()
    }


def compare(ordeal: Ordeal, reference: Ordeal) -> None:
    """That nothing was lost: the state to the bit, the text to the token, ledger and manifest to the word."""
    same_state(ordeal, reference)
    same_text(ordeal)
    same_ledger(ordeal, reference)


def same_state(ordeal: Ordeal, reference: Ordeal) -> None:
    ours, theirs = ordeal.state, reference.state
    assert (ours.round, ours.step, ours.changes) == (theirs.round, theirs.step, theirs.changes)
    assert sorted(ours.tensors) == sorted(theirs.tensors)
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    assert list(ours.silos) == list(theirs.silos)
    for name, record in theirs.silos.items():
        mine = ours.silos[name]
        assert (mine.position, mine.rounds, mine.tokens) == (record.position, record.rounds, record.tokens), name
        assert str(mine.snapshot).split("-")[0] == str(record.snapshot).split("-")[0], name
        if record.snapshot is None or mine.snapshot is None:
            continue
        held, about = load_snapshot(silo_folder(ordeal.job, name) / mine.snapshot)
        expected, _ = load_snapshot(silo_folder(reference.job, name) / record.snapshot)
        assert about["position"] == record.position
        assert {stem: sorted(tensors) for stem, tensors in held.items()} == {s: sorted(t) for s, t in expected.items()}
        for stem, tensors in expected.items():
            assert all(torch.equal(held[stem][key], tensor) for key, tensor in tensors.items()), (name, stem)


def same_text(ordeal: Ordeal) -> None:
    """What every accepted update read, put together, is one silo's text read once from its beginning."""
    pool = TracedPool()
    job = changed(ordeal.job, ordeal.state.changes)
    pool.open(job, job)
    for name, silo in pool.silos.items():
        if name not in ordeal.state.silos:
            continue
        record, trained = ordeal.state.silos[name], []
        for line in ordeal.rounds:
            if name in line["silos"]:
                read = ordeal.reads[(line["round"] - 1, line["attempt"], name)]
                trained += read[: line["silos"][name]["steps"]]
        batches = type(silo.stream).batches(silo.stream, silo.stream.start(), len(trained))
        assert trained == [checksum(np.ascontiguousarray(batch)) for batch in batches], name
        inner = job.inner
        assert sum(record.position.values()) == inner.batch_size * len(trained), name
        assert record.tokens == inner.batch_size * inner.context * len(trained), name
    pool.close()


def same_ledger(ordeal: Ordeal, reference: Ordeal) -> None:
    rounds, state = ordeal.rounds, ordeal.state
    assert [record["round"] for record in rounds] == list(range(1, state.round + 1))
    assert ordeal.records[-1]["event"] == "scores"
    for at, record in enumerate(rounds):
        done = rounds[: at + 1]
        assert record["tokens"] == sum(silo["tokens"] for r in done for silo in r["silos"].values())
        tries = [*record.get("failed", []), record]
        assert [each["attempt"] for each in tries] == list(range(len(tries)))
        for each in tries:
            moments = {m: word for m, word in ordeal.lost.items() if m[:2] == (at, each["attempt"])}
            lost = {name: word for (_, _, name), word in moments.items()}
            assert sorted(each["refused"]) == sorted(lost)
            for name, word in lost.items():
                assert re.search(word, each["refused"][name]), (record["round"], name, each["refused"], word)
    store = RunStore(ordeal.job)
    assert store.rounds()[-1] == state.round
    for round in store.rounds():
        kept, manifest = load_round(store.folder, round)
        assert manifest["record"] == rounds[round - 1]
        assert (kept.round, kept.step) == (round, rounds[round - 1]["step"])
        assert sum(silo.tokens for silo in kept.silos.values()) == rounds[round - 1]["tokens"]
    made = [r["change"] for r in ordeal.records if r["event"] == "change" and "refused" not in r]
    assert made == list(state.changes)
    assert comparable(ordeal.records) == comparable(reference.records)


def comparable(records: list[dict[str, Any]]) -> list[Any]:
    """What must be equal in both runs: all but clocks, attempts, and who was lost, why, at what cost."""
    kept = []
    for record in records:
        if record["event"] == "change" and "refused" in record:
            continue
        left_out = ("time", "seconds", "attempt", "refused", "failed", "away", "sent_bytes")
        line = {key: value for key, value in record.items() if key not in left_out}
        if record["event"] == "round":
            cost = ("seconds", "down_bytes", "lost")  # who was made anew is told more than who was not
            line["silos"] = {n: {k: v for k, v in s.items() if k not in cost} for n, s in record["silos"].items()}
        kept.append(line)
    return kept


def timeless(value: Any) -> Any:
    """A record without clock readings."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("time", "seconds")}
    return value
