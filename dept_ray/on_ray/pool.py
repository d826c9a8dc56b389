"""`RayPool`: silos as actors. Place them, order them, wait, and place anew what died or froze.

The body is put into the object store once a round and read by every silo without a copy; deltas come back as return
values of their own, so they outlive their silo. Ray restarts nothing by itself: a silo that died is made anew while the
others go on, and reloads the snapshot which its next order names. One that has no place yet holds nothing up.
"""

import math
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from dept_ray.config import Job
from dept_ray.errors import ClusterError, DeptError, SiloError
from dept_ray.messages import RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.on_ray.actors import SiloActor
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.pool import resources_of, specs_of
from dept_ray.silo.hardware import MALLOC_SETTINGS
from dept_ray.text.prepare import prepare

_LOOK_EVERY_S = 0.5
_PING_S = 5.0


class RayPool:
    """The silos of one run, as children of the calling process.

    Args:
        cores: of a node, shared by the silos; None: this machine's.
    """

    def __init__(self, cores: int | None = None) -> None:
        self.cores = cores
        self.actors: dict[str, Any] = {}
        self._cards: dict[str, SiloCard] = {}
        self._opening: dict[str, tuple[Any, float]] = {}
        """Silos that were placed and have not shown their card yet: (reference, since when)."""
        self._tries: dict[str, int] = {}
        self._failed: dict[str, DeptError] = {}
        self._prepared: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Newcomers whose text is ready; the thread that runs the rounds places them."""
        self._statuses: dict[str, SiloStatus] = {}
        self._lock = threading.Lock()

    @property
    def cards(self) -> dict[str, SiloCard]:
        return dict(self._cards)

    def open(self, job: Job) -> None:
        self.job, self.specs = job, specs_of(job, self.cores)
        for name in self.specs:
            self._place(name)
        deadline = time.monotonic() + job.faults.start_timeout_s
        while self._opening and time.monotonic() < deadline:
            self._settle(_LOOK_EVERY_S)
            joined = {source.name for source in job.sources if source.joined}
            if missing := self._failed.keys() - joined:  # one that joined, and cannot, was never needed
                raise self._failed[min(missing)]
        if not self._cards:
            wishes = {name: resources_of(job, name) for name in self._opening}
            asked = "; ".join(f"{n}: {w.num_gpus:g} GPUs, {w.num_cpus:g} CPUs, {w.labels}" for n, w in wishes.items())
            raise ClusterError(
                f"no silo was placed within faults.start_timeout_s = {job.faults.start_timeout_s:g} s ({asked}): "
                "is there such a node?"
            )

    def add(self, job: Job, silo: str) -> None:
        """Its text is prepared in the background; a source that cannot be is among `failed`."""
        self.job, self.specs = job, specs_of(job, self.cores)
        self._failed.pop(silo, None)
        threading.Thread(target=self._prepare_and_place, args=(job, silo), daemon=True).start()

    def ready(self) -> set[str]:
        self._replace_dead()
        while any(time.monotonic() - since < self.job.faults.patience_s for _, since in self._opening.values()):
            self._settle(0.1)
        self._settle(0)
        return set(self.actors) - set(self._opening)

    def run_round(self, orders: Mapping[str, RoundOrder], deadline_s: float) -> dict[str, SiloUpdate | Exception]:
        bodies = {id(order.body): ray.put(order.body) for order in _distinct(orders)}
        asked = {}
        for name, order in orders.items():
            body, rows = bodies.get(id(order.body)), None if order.rows is None else ray.put(order.rows)
            meta, *arrays = self.actors[name].obey.remote(order.without_arrays(), body, rows)
            asked[meta] = (name, arrays)
        answers: dict[str, SiloUpdate | Exception] = {}
        waiting, began, stopped_at = list(asked), time.monotonic(), None
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_LOOK_EVERY_S)
            for meta in ready:
                name, arrays = asked[meta]
                answers[name] = _collect(meta, arrays)
            self._poll(asked[meta][0] for meta in waiting)
            now = time.monotonic()
            if stopped_at is None and now - began > deadline_s:
                stopped_at = now
                for name in (asked[meta][0] for meta in waiting):
                    self.actors[name].stop.remote(orders[name].round, orders[name].attempt)
            if stopped_at is not None and now - stopped_at > self.job.faults.grace_s:
                break
        for meta in waiting:  # its answer, should it ever come, is to a question that nobody asks any more
            name = asked[meta][0]
            answers[name] = SiloError(
                f"late: no answer in {deadline_s:.0f} s and {self.job.faults.grace_s:.0f} s of grace"
            )
            self._place_anew(name)
        return answers

    def statuses(self) -> dict[str, SiloStatus]:
        with self._lock:
            return dict(self._statuses)

    def failed(self) -> dict[str, str]:
        return {name: f"{type(err).__name__}: {err}" for name, err in self._failed.items()}

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors, self._opening = {}, {}

    # ------------------------------------------------------------------------------------------ placing
    def _place(self, name: str, hold_up: bool = True) -> None:
        """Ask Ray for a silo; `hold_up`: whether a round may wait for it, for a while."""
        resources = resources_of(self.job, name)
        env = {"TOKENIZERS_PARALLELISM": "false"} | ({} if resources.num_gpus else MALLOC_SETTINGS)
        options: dict[str, Any] = {"label_selector": resources.labels} if resources.labels else {}
        as_actor: Any = ray.remote
        actor = as_actor(concurrency_groups={"control": 2})(SiloActor).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=0, max_task_retries=0,
            runtime_env={"env_vars": env}, **options,
        ).remote(self.job.model_dump_json(), self.specs[name])  # fmt: skip
        self.actors[name] = actor
        self._opening[name] = (actor.card.remote(), time.monotonic() if hold_up else -math.inf)
        self._note(SiloStatus(name, "starting"))

    def _place_anew(self, name: str) -> None:
        """Give up a silo's process, whatever it is doing, and make another."""
        ray.kill(self.actors[name])
        self._place(name)

    def _prepare_and_place(self, job: Job, silo: str) -> None:
        from dept_ray.on_ray.ingest import ray_data_runner

        self._note(SiloStatus(silo, "preparing"))
        try:
            prepare(job, "own" if method_of(job).vocabulary == "own" else "global", ray_data_runner(job))
        except DeptError as err:
            self._failed[silo] = err
            return
        self._prepared.put(silo)

    def _settle(self, timeout_s: float) -> None:
        """Place who was prepared; see who has opened, or failed to."""
        while not self._prepared.empty():
            self._place(self._prepared.get(), hold_up=False)
        refs = {ref: name for name, (ref, _) in self._opening.items()}
        opened = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else []
        for ref in opened:
            name = refs[ref]
            try:
                self._cards[name] = ray.get(ref)
                del self._opening[name]
                self._tries[name] = 0
                self._note(SiloStatus(name))
            except RayError as err:
                self._tries[name] = self._tries.get(name, 0) + 1
                reason = explain(err)
                if _is_data(err) or self._tries[name] >= self.job.faults.failures:
                    self._failed[name] = reason
                    del self._opening[name], self.actors[name]
                else:
                    self._place(name)

    def _replace_dead(self) -> None:
        """Ask everyone for a sign of life. Who is dead is made anew; who is silent is left alone until Ray decides."""
        refs = {actor.status.remote(): name for name, actor in self.actors.items() if name not in self._opening}
        answered, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_PING_S) if refs else ([], [])
        for ref in answered:
            try:
                self._note(ray.get(ref))
            except RayActorError:
                self._place(refs[ref])

    def _poll(self, names: Iterable[str]) -> None:
        """Ask those who train how they are; who does not answer at once keeps its last word."""
        refs = [self.actors[name].status.remote() for name in names]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0.2) if refs else ([], [])
        for ref in ready:
            try:
                self._note(ray.get(ref))
            except RayError:  # its order will say so
                continue

    def _note(self, status: SiloStatus) -> None:
        with self._lock:
            self._statuses[status.silo] = status


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


def _is_data(err: RayError) -> bool:
    """Whether a silo could not open for a reason that trying again does not mend."""
    return isinstance(err, RayTaskError) and isinstance(err.cause, DeptError)


def explain(err: RayError) -> DeptError:
    """What went wrong in an actor, as one of our own errors."""
    cause: Any = err.cause if isinstance(err, RayTaskError) else err
    if isinstance(cause, DeptError):
        return type(cause)(*cause.args)
    text = str(cause).strip()
    return SiloError(f"{type(cause).__name__}: {text.splitlines()[-1] if text else 'no message'}")
