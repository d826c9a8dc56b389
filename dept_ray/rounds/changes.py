"""What people asked for, made true between two rounds, and put on record.

A key that is set and a source that is added change the job; a silo that is dropped or returns changes who is there. All
of it is part of the state, so a resumed run has the same job and the same silos.
"""

import time
from dataclasses import replace
from typing import Any

from dept_ray.config import Change, Job
from dept_ray.errors import ConfigError, DeptError
from dept_ray.metrics import Sink
from dept_ray.rounds.control import Control
from dept_ray.rounds.methods import method_of, silos_of
from dept_ray.rounds.pool import SiloPool
from dept_ray.rounds.state import RunState, SiloRecord

DROPPED = "dropped"


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
    return job.changed([change])


def obey_people(job: Job, state: RunState, pool: SiloPool, log: Sink, control: Control) -> tuple[Job, RunState]:
    """Wait while the run is held; then make what was asked for true.

    Returns:
        The job in force, and the state with the changes on record.
    """
    control.wait_for_turn()
    for change in control.take_changes():
        try:
            changed = check_change(job, change)
            if changed.rounds.total <= state.round:
                raise ConfigError(
                    f"rounds.total = {changed.rounds.total}: round {state.round} is committed; stop the run"
                )
            if "add" in change:
                pool.add(changed, change["add"]["name"])
        except DeptError as err:  # asked for in good order, but another change came first, or the source has no text
            log(_record(job, state, change, refused=str(err)))
            continue
        job = changed
        if "drop" in change:
            state = _with(job, state, change["drop"], away=DROPPED)
        elif "return" in change:
            state = _with(job, state, change["return"], away="", failures=0)
        state = replace(state, changes=(*state.changes, change))
        log(_record(job, state, change))
    return job, state


def with_newcomers(state: RunState, pool: SiloPool) -> RunState:
    """The state with a record for every silo that has become ready since: it has trained nothing yet."""
    new = pool.ready() - state.silos.keys()
    cards = pool.cards
    new = {name: SiloRecord(position=dict.fromkeys(cards[name].sources, 0)) for name in new}
    return replace(state, silos=dict(sorted({**state.silos, **new}.items()))) if new else state


def _with(job: Job, state: RunState, silo: str, **changes: Any) -> RunState:
    fresh = SiloRecord(position=dict.fromkeys(silos_of(job)[silo], 0))  # it joined and is not ready yet
    record = replace(state.silos.get(silo, fresh), **changes)
    return replace(state, silos=dict(sorted({**state.silos, silo: record}.items())))


def _record(job: Job, state: RunState, change: Change, **more: Any) -> dict[str, Any]:
    about = {"event": "change", "run": job.name, "round": state.round, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**about, "change": change, **more}
