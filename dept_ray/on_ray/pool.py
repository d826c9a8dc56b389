"""`RayPool`: silos as actors. Place them, order them, wait, and place anew what died.

The body is put into the object store once a round and read by every silo without a copy; deltas come back as return
values of their own, so they outlive their silo. Ray restarts nothing by itself: a silo that died is made anew before
the next order and reloads the snapshot which that order names.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from dept_ray.config import Job
from dept_ray.errors import ClusterError, DeptError, SiloError
from dept_ray.messages import RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.on_ray.actors import SiloActor
from dept_ray.rounds.pool import resources_of, specs_of
from dept_ray.silo.hardware import MALLOC_SETTINGS

_STATUS_EVERY_S = 0.5


class RayPool:
    """The silos of one run, as children of the calling process.

    Args:
        job: the run.
        cores: of a node, shared by the silos; None: this machine's.
    """

    def __init__(self, job: Job, cores: int | None = None) -> None:
        self.job, self.specs = job, specs_of(job, cores)
        self.actors: dict[str, Any] = {}
        self.hardware: dict[str, str] = {}
        self._statuses = {name: SiloStatus(name, "starting") for name in self.specs}
        self._lock = threading.Lock()

    def open(self) -> dict[str, SiloCard]:
        self.actors = {name: self._place(name) for name in self.specs}
        cards = self._cards(list(self.actors))
        self.hardware = {name: card.hardware for name, card in cards.items()}
        return cards

    def run_round(self, orders: Mapping[str, RoundOrder]) -> dict[str, SiloUpdate | Exception]:
        self._replace_dead(list(orders))
        bodies = {id(order.body): ray.put(order.body) for order in _distinct(orders)}
        asked = {}
        for name, order in orders.items():
            body, rows = bodies.get(id(order.body)), None if order.rows is None else ray.put(order.rows)
            meta, *arrays = self.actors[name].obey.remote(order.without_arrays(), body, rows)
            asked[meta] = (name, arrays)
        answers: dict[str, SiloUpdate | Exception] = {}
        waiting = list(asked)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_STATUS_EVERY_S)
            for meta in ready:
                name, arrays = asked[meta]
                answers[name] = _collect(meta, arrays)
            self._poll(asked[meta][0] for meta in waiting)
        return answers

    def statuses(self) -> dict[str, SiloStatus]:
        with self._lock:
            return dict(self._statuses)

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors = {}

    # ------------------------------------------------------------------------------------------ placing
    def _place(self, name: str) -> Any:
        resources = resources_of(self.job, name)
        env = {"TOKENIZERS_PARALLELISM": "false"} | ({} if resources.num_gpus else MALLOC_SETTINGS)
        options: dict[str, Any] = {"label_selector": resources.labels} if resources.labels else {}
        as_actor: Any = ray.remote
        return as_actor(concurrency_groups={"control": 2})(SiloActor).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=0, max_task_retries=0,
            runtime_env={"env_vars": env}, **options,
        ).remote(self.job.model_dump_json(), self.specs[name])  # fmt: skip

    def _cards(self, names: list[str]) -> dict[str, SiloCard]:
        """Wait for silos to be placed and opened.

        Raises:
            ClusterError: one was not placed in time.
            DeptError: one could not open its data.
        """
        refs = {name: self.actors[name].card.remote() for name in names}
        deadline = time.monotonic() + self.job.rounds.start_timeout_s
        cards = {}
        for name, ref in refs.items():
            try:
                cards[name] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            except GetTimeoutError:
                wish, limit = resources_of(self.job, name), self.job.rounds.start_timeout_s
                raise ClusterError(
                    f"silo {name} was not placed within rounds.start_timeout_s = {limit:g} s; it asks for "
                    f"{wish.num_gpus:g} GPUs, {wish.num_cpus:g} CPUs and labels {wish.labels}: is there such a node?"
                ) from None
            except RayError as err:
                raise explain(err) from None
        return cards

    def _replace_dead(self, names: list[str]) -> None:
        dead = []
        for name in names:
            try:
                ray.get(self.actors[name].status.remote(), timeout=30)
            except (RayActorError, GetTimeoutError):
                self.actors[name] = self._place(name)
                dead.append(name)
        if dead:
            self._cards(dead)

    def _poll(self, names: Any) -> None:
        """Ask those who train how they are; who does not answer at once keeps its last word."""
        refs = {self.actors[name].status.remote(): name for name in names}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0.2) if refs else ([], [])
        for ref in ready:
            try:
                status = ray.get(ref)
            except RayError:
                continue
            with self._lock:
                self._statuses[refs[ref]] = status


def _distinct(orders: Mapping[str, RoundOrder]) -> list[RoundOrder]:
    """One order for each different body; all silos share one."""
    return list({id(order.body): order for order in orders.values() if order.body is not None}.values())


def _collect(meta: Any, arrays: list[Any]) -> SiloUpdate | Exception:
    """One answer, or why there is none."""
    try:
        update: Any = ray.get(meta)
        body, rows = ray.get(arrays)
    except RayError as err:
        return explain(err)
    return replace(update, body=body, rows=rows)


def explain(err: RayError) -> DeptError:
    """What went wrong in an actor, as one of our own errors."""
    cause: Any = err.cause if isinstance(err, RayTaskError) else err
    if isinstance(err, RayActorError) and getattr(err, "actor_init_failed", False):
        cause = err
    if isinstance(cause, DeptError):
        return type(cause)(*cause.args)
    return SiloError(
        f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else 'no message'}"
    )
