"""What people asked for, made true between two rounds, and put on record.

A key that is set and a source that is added change the job; a silo that is dropped or returns changes who is there. All
of it is part of the state, so a resumed run has the same job (`changed`) and the same silos.
"""

import time
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError, DeptError, nearest
from dept_ray.jobfile import parse_job
from dept_ray.messages import Change, SiloCard
from dept_ray.metrics import Record, Sink
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


def check_change(
    job: Job, change: Change, committed: int = 0, away: Collection[str] = (), mendable: Collection[str] = ()
) -> Job:  # fmt: skip
    """The job after a change that someone asks for.

    Args:
        job: in force, or as asked for so far.
        change: what is asked for now.
        committed: rounds.
        away: silos that take no part.
        mendable: sources that joined and never could, so that one of the same name may take their place.

    Raises:
        ConfigError: it cannot be made in a run; with the reason and the remedy.
    """
    silos = silos_of(job)
    name = change.get("drop") or change.get("return")
    if name is not None and name not in silos:
        raise ConfigError(f'no silo "{name}" in run {job.name}; known: {", ".join(silos)}')
    if "drop" in change and not set(silos) - set(away) - {name}:
        raise ConfigError(f"{name} is the last silo that works: let another join or return first, or stop the run")
    if "add" in change:
        _check_newcomer(job, change["add"].get("name"), mendable)
    wanted = changed(job, [change])
    silos_of(wanted)  # refuses what the method cannot hold
    if change.get("set") == "rounds.total" and wanted.rounds.total <= committed:
        raise ConfigError(f"rounds.total = {wanted.rounds.total}: round {committed} is committed; stop the run")
    return wanted


def check_asked(job: Job, change: Change, records: Sequence[Record], pending: Sequence[Change], pool: SiloPool) -> Job:
    """`check_change` for one who knows no state, but what is on record, what is asked for besides, and the pool.

    Raises:
        ConfigError: it cannot be made in a run; with the reason and the remedy.
    """
    rounds = [record for record in records if record["event"] == "round"]
    trained = {name for record in rounds for name in record["silos"]}
    committed = max((record["round"] for record in rounds), default=0)
    away = _away_by(records, pending) | pool.failed().keys()
    return check_change(job, change, committed, away, _mendable(job, trained, pool))


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
            mendable = _mendable(job, {name for name, silo in state.silos.items() if silo.rounds}, pool)
            wanted = check_change(job, change, state.round, _away(state) | pool.failed().keys(), mendable)
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
        elif change.get("add", {}).get("name") in state.silos:  # in the place of one that was dropped as it never came
            state = _with(job, state, change["add"]["name"], away="", failures=0)
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


def _away_by(records: Sequence[Record], pending: Sequence[Change]) -> set[str]:
    """Who takes no part: as the last round says, and by what was changed or asked for since."""
    away = set[str]()
    for record in [*records, *({"event": "change", "change": change} for change in pending)]:
        if record["event"] == "round":
            away = set(record.get("away", ()))
        elif record["event"] == "change" and "refused" not in record:
            change = record["change"]
            away |= {change["drop"]} if "drop" in change else set()
            away -= {change.get("return"), change.get("add", {}).get("name")}
    return away


def _mendable(job: Job, trained: Collection[str], pool: SiloPool) -> set[str]:
    """Sources that joined and never could: their silo was not made, here or by a life before. A region that is silent
    may have made it, so that behind a mailbox nobody knows."""
    if job.regions.mailbox is not None:
        return set()
    joined = {source.name for source in job.sources if source.joined}
    return joined & pool.failed().keys() - pool.cards.keys() - set(trained)


def _check_newcomer(job: Job, name: object, mendable: Collection[str]) -> None:
    if method_of(job).mixed:
        raise ConfigError(f"run {job.name} trains one silo on a mixture: a source cannot join it; start another run")
    if name not in mendable and any(source.name == name for source in job.sources):
        raise ConfigError(
            f'run {job.name}: sources: the name "{name}" stands twice; each source needs a name of its own'
        )


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
        new, sources = {**change["add"], "joined": True}, values["sources"]
        same = (n for n, source in enumerate(sources) if source["joined"] and source["name"] == new.get("name"))
        place = next(same, len(sources))  # of one that never could join (`check_change`), or a new one
        sources[place : place + 1] = [new]
    return parse_job(values, where=f"run {job.name}")


def _with(job: Job, state: RunState, silo: str, **changes: Any) -> RunState:
    fresh = SiloRecord(position=dict.fromkeys(silos_of(job)[silo], 0))  # it joined and is not ready yet
    record = replace(state.silos.get(silo, fresh), **changes)
    return replace(state, silos=dict(sorted({**state.silos, silo: record}.items())))


def _record(job: Job, state: RunState, change: Change, **more: Any) -> dict[str, Any]:
    about = {"event": "change", "run": job.name, "round": state.round, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**about, "change": change, **more}
