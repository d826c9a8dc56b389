"""A coordinator that is killed at a planned step of a round's commit, each time once; its silos note what they read.

Ray's workers get this module by value: they need no tests/.
"""

import json
import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from faulty_silo import FaultySilo

from dept_ray.config import Job
from dept_ray.metrics import JsonLines
from dept_ray.on_ray.actors import CoordinatorActor
from dept_ray.on_ray.pool import RayPool
from dept_ray.rounds import store as store_module
from dept_ray.rounds.pool import nothing
from dept_ray.rounds.store import RunStore

STEPS = (
    "before the orders", "before the outer step", "before any file", "before the manifest", "after the manifest",
    "before the log line", "within the log line", "after the log line",
)  # fmt: skip


def coordinator_that_dies(plan: Mapping[int, str], pace_s: float = 0.0) -> type[CoordinatorActor]:
    """Killed in rounds (0 is the first) at one of `STEPS`; each step of its silos takes `pace_s` at least."""

    class DyingCoordinator(CoordinatorActor):
        def __init__(self, job: str, *more: Any) -> None:
            where = Job.model_validate_json(job)
            arm(dict(plan), Path(where.folder) / "notes", pace_s)
            super().__init__(job, *more)

    return DyingCoordinator


def arm(plan: dict[int, str], notes: Path, pace_s: float) -> None:
    """Let the plan act in this process."""
    now = {"round": -1}

    def perhaps_die(how: str, round: int | None = None) -> None:
        round = now["round"] if round is None else round
        if plan.get(round) == how:
            try:
                (notes / f"claim-coordinator-{round}").mkdir(parents=True)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    make, run_round = RayPool.__init__, RayPool.run_round
    write, save, log = store_module.write_atomically, RunStore.save, JsonLines.__call__

    def traced(self: RayPool, cores: int | None = None) -> None:
        make(self, cores, partial(FaultySilo, {}, str(notes), True, pace_s=pace_s))

    def run_round_or_die(self: RayPool, orders: Any, deadline: Any, meanwhile: Any = nothing) -> Any:
        """The round before is committed in the middle of it: `now` names the round whose commit comes next."""
        if not any(order.steps for order in orders.values()):
            return run_round(self, orders, deadline, meanwhile)
        round = next(iter(orders.values())).round
        perhaps_die("before the orders", round)

        def commit() -> None:
            meanwhile()
            now["round"] = round

        answers = run_round(self, orders, deadline, commit)
        perhaps_die("before the outer step")
        return answers

    def save_or_die(self: RunStore, *more: Any) -> None:
        perhaps_die("before any file")
        save(self, *more)
        perhaps_die("after the manifest")

    def write_or_die(path: Path, data: Any) -> None:
        if path.name == "manifest.json":
            perhaps_die("before the manifest")
        write(path, data)

    def log_or_die(self: JsonLines, record: dict[str, Any]) -> None:
        perhaps_die("before the log line")
        if plan.get(now["round"]) == "within the log line" and record["event"] == "round":
            with open(self.path, "a") as file:
                file.write(json.dumps(record)[:60])
            perhaps_die("within the log line")
        log(self, record)
        perhaps_die("after the log line")

    RayPool.__init__, RayPool.run_round = traced, run_round_or_die
    store_module.write_atomically, RunStore.save, JsonLines.__call__ = write_or_die, save_or_die, log_or_die
