"""What people asked for, made true between two rounds, and put on record.

A key that is set and a source that is added change the job; a silo that is dropped or returns changes who is there. All
of it is part of the state, so a resumed run has the same job (`changed`) and the same silos.
"""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError, DeptError, nearest
from dept_ray.jobfile import parse_job
from dept_ray.messages import Change, SiloCard
from dept_ray.metrics import Sink
from dept_ray.rounds.control import Control
from dept_ray.rounds.methods import method_of, silos_of
from dept_ray.rounds.pool import SiloPool
from dept_ray.rounds.state import RunState, SiloRecord

DROPPED = "dropped"

LIVE_KEYS = frozenset(
    {
        "inner.local_steps", "inner.lr", "outer.lr", "outer.momentum", "outer.rows_lr", "outer.rows_momentum",
        "rounds.total", "rounds.choose", "rounds.score_every",
        "faults.quorum", "faults.attempts", "faults.failures", "faults.deadline_mads", "faults.deadline_floor_s",
        "faults.deadline_cap_s", "faults.norm_limit", "faults.norm_policy", "faults.newcomer_steps",
        "faults.newcomer_rows",
    }
)  # fmt: skip
"""What `dept-ray set` may change in a run; all else decides what the run *is*."""


def changed(job: Job, changes: Sequence[Change]) -> Job:
    """The job after changes that people made while it ran, in their order.

    Raises:
        ConfigError: a key cannot be changed in a run, or its value is wrong.
    """
    for change in changes:
        job = _changed(job, change)
    return job


def check_change(job: Job, change: Change) -> Job:
    """The job after a change that someone asks for.

    Raises:
        ConfigError: it cannot be made in a run; with the reason and the remedy.
    """
    name = change.get("drop") or change.get("return")
    if name is not None and name not in silos_of(job):
        raise ConfigError(f'no silo "{name}" in run {job.name}; known: {", ".join(silos_of(job))}')
    if "add" in change and method_of(job).mixed:
        raise ConfigError(f"run {job.name} trains one silo on a mixture: a source cannot join it; start another run")
    wanted = changed(job, [change])
    silos_of(wanted)  # refuses what the method cannot hold
    return wanted


def obey_people(job: Job, state: RunState, pool: SiloPool, log: Sink, control: Control) -> tuple[Job, RunState]:
    """Wait while the run is held; then make what was asked for true.

    Returns:
        The job in force, and the state with the changes on record.
    """
    if state.round < job.rounds.total:
        control.wait_for_turn()
    for change in control.take_changes():
        state = replace(state, heard=state.heard + 1)
        try:
            wanted = check_change(job, change)
            if change.get("set") == "rounds.total" and wanted.rounds.total <= state.round:
                raise ConfigError(
                    f"rounds.total = {wanted.rounds.total}: round {state.round} is committed; stop the run"
                )
            if "drop" in change and not set(silos_of(job)) - _away(state) - {change["drop"]}:
                raise ConfigError(
                    f"{change['drop']} is the last silo that works: let another join or return first, or stop the run"
                )
            if name := change.get("return") or change.get("add", {}).get("name"):
                pool.add(wanted, name)
        except DeptError as err:  # asked for in good order, but another change came first, or the source has no text
            log(_record(job, state, change, refused=str(err)))
            continue
        job = wanted
        if "drop" in change:
            state = _with(job, state, change["drop"], away=DROPPED)
        elif "return" in change:
            state = _with(job, state, change["return"], away="", failures=0)
        state = replace(state, changes=(*state.changes, change))
        log(_record(job, state, change))
    return job, state


def with_newcomers(state: RunState, ready: Set[str], cards: Mapping[str, SiloCard]) -> RunState:
    """The state with a record for every silo that has become ready since: it has trained nothing yet."""
    new = {name: SiloRecord(position=dict.fromkeys(cards[name].sources, 0)) for name in ready - state.silos.keys()}
    return replace(state, silos=dict(sorted({**state.silos, **new}.items()))) if new else state


def donors_of(job: Job, state: RunState, name: str) -> dict[str, str]:
    """By silo, the snapshots whose rows a newcomer begins from: of those who came before it, take part, and live where
    it lives, so that no row leaves its home (`silo.donors`); none, where rows are shared or it has trained already."""
    method, asked = method_of(job), job.faults.newcomer_rows != "random" and job.init.embedding == "random"
    if not asked or method.mixed or method.share_rows != "none" or job.regions.mailbox is not None:
        return {}
    if state.silos[name].rounds or not job.source(name).joined:
        return {}
    before = job.trained[: job.trained.index(name)]
    silos = {other: state.silos[other] for other in before if other in state.silos}
    return {
        other: silo.snapshot
        for other, silo in silos.items()
        if silo.snapshot and not silo.away and job.storage_of(other) == job.storage_of(name)
    }


def _away(state: RunState) -> set[str]:
    return {name for name, silo in state.silos.items() if silo.away}


def _changed(job: Job, change: Change) -> Job:
    """The job after one change. Dropping and returning change who is there, not the job."""
    values = job.model_dump(mode="json")
    if "set" in change:
        key, value = change["set"], change["to"]
        if key not in LIVE_KEYS:
            raise ConfigError(f"{key} cannot be changed in a run{nearest(key, sorted(LIVE_KEYS))}")
        section, name = key.split(".")
        values[section][name] = value
    elif "add" in change:
        values["sources"].append({**change["add"], "joined": True})
    return parse_job(values, where=f"run {job.name}")


def _with(job: Job, state: RunState, silo: str, **changes: Any) -> RunState:
    fresh = SiloRecord(position=dict.fromkeys(silos_of(job)[silo], 0))  # it joined and is not ready yet
    record = replace(state.silos.get(silo, fresh), **changes)
    return replace(state, silos=dict(sorted({**state.silos, silo: record}.items())))


def _record(job: Job, state: RunState, change: Change, **more: Any) -> dict[str, Any]:
    about = {"event": "change", "run": job.name, "round": state.round, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**about, "change": change, **more}
