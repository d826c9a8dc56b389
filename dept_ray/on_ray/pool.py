"""`RayPool`: a round on a cluster. Order the silos, wait, ask the late to hand in what they have, give up the mute.

The body is put into the object store once a round and read by every silo without a copy; deltas come back as return
values of their own, so they outlive their silo, and stay in the store until they are folded. An answer counts as there
once its arrays are: the deadline bounds the way home too. Where silos live is `places`.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dept_ray.config import Job
from dept_ray.errors import DeptError, SiloError
from dept_ray.messages import Delta, Held, RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.on_ray.actors import explain
from dept_ray.on_ray.places import LOOK_EVERY_S, Places
from dept_ray.rounds.pool import Beside, Deadline, MakeSilo, Meanwhile, beside, nothing, specs_of, timed
from dept_ray.silo.silo import Silo

TAKING_UP_S = 5.0
"""How long what is done meanwhile waits for silos to take up their orders: who takes longer waits for a line."""


@dataclass
class _Call:
    """An order on its way."""

    refs: list[Any]
    """Meta, body, rows: what has not arrived yet."""
    all_refs: list[Any]
    asked_at: float
    stopped_at: float | None = None


class RayPool:
    """The silos of one run, as children of the calling process.

    Args:
        cores: of a node, shared by the silos; None: this machine's.
        make: what makes a silo.
    """

    remote = True

    def __init__(self, cores: int | None = None, make: MakeSilo = Silo) -> None:
        self.cores, self.places = cores, Places(make)
        self._hurried = threading.Event()
        self._obeyed: dict[str, RoundOrder] = {}
        """By silo, its last order, where it may be making steps ahead of the next."""

    @property
    def cards(self) -> dict[str, SiloCard]:
        return dict(self.places.cards)

    def open(self, job: Job, first: Job) -> None:
        self.job, self.first = job, first
        self.places.plan(job, specs_of(job, first, self.cores))
        self.places.open()

    def add(self, job: Job, silo: str) -> None:
        self.job = job
        self.places.plan(job, specs_of(job, self.first, self.cores))
        self.places.prepare_and_place(silo)

    def ready(self) -> set[str]:
        return self.places.ready()

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        vectors = {id(v): v for order in orders.values() for v in (order.body, order.rows) if v is not None}
        stored = {key: ray.put(vector) for key, vector in vectors.items()}  # once for all who get the same
        calls = {name: self._ask(order, stored) for name, order in orders.items()}
        asked_at = {name: call.asked_at for name, call in calls.items()}
        answers, at = dict[str, SiloUpdate | Exception](), dict[str, float]()
        with beside(meanwhile) as work:
            self._await(orders, calls, deadline, work, answers, at)
        self._hurried.clear()
        return timed(answers, asked_at, at)

    def _await(
        self, orders: Mapping[str, RoundOrder], calls: dict[str, _Call], deadline: Deadline, work: Beside,
        answers: dict[str, SiloUpdate | Exception], at: dict[str, float],
    ) -> None:  # fmt: skip
        """Until every call is answered or given up; what came, and when, goes into `answers` and `at`."""
        began, looked = time.monotonic(), 0.0
        while calls:
            work.look()
            ray.wait([call.refs[0] for call in calls.values()], timeout=LOOK_EVERY_S)
            for name in [name for name, call in calls.items() if _arrived(call)]:
                answers[name] = self._collect(name, calls.pop(name).all_refs)
                at[name] = time.monotonic()
                work.begin()
            now = time.monotonic()
            if calls and now - looked >= LOOK_EVERY_S:
                looked = now
                self.places.poll(calls)
                if self._taken_up(orders, calls) or now - began > TAKING_UP_S:
                    work.begin()
                late = now - began > deadline([at[name] - began for name in at])
                self._stop(orders, calls, calls if late or self._hurried.is_set() else self.places.leaving())
                for name in self._given_up(calls, now):
                    answers[name], at[name] = self._give_up(name, now - began), now

    def hand_in(self) -> None:
        self._hurried.set()

    def rest(self) -> None:
        for name in list(self._obeyed):
            self._end_ahead(name)

    def statuses(self) -> dict[str, SiloStatus]:
        return self.places.statuses()

    def failed(self) -> dict[str, str]:
        return {name: f"{type(err).__name__}: {err}" for name, err in dict(self.places.failed).items()}

    def close(self) -> None:
        self.places.close()

    # ------------------------------------------------------------------------------------------ parts of a round
    def _ask(self, order: RoundOrder, stored: Mapping[int, Any]) -> _Call:
        body, rows = stored.get(id(order.body)), stored.get(id(order.rows))
        asked_at, silo = time.monotonic(), self.places.actors[order.silo]
        self._end_ahead(order.silo, body, rows)
        refs = silo.obey.remote(order.without_arrays(), body, rows)
        if self.job.inner.ahead_steps and order.steps:
            silo.go_ahead.remote()
            self._obeyed[order.silo] = order.without_arrays()
        return _Call(list(refs), list(refs), asked_at)

    def _end_ahead(self, name: str, *until: Any) -> None:
        """Its steps ahead end when it has what they wait for, on its own node: by then the line is the slow part.

        What it has made counts if its next order is the one it expects, and is made anew if it is not.
        """
        if (order := self._obeyed.pop(name, None)) is not None and name in self.places.actors:
            self.places.actors[name].stop.remote(order.round, order.attempt, *until)

    def _collect(self, name: str, refs: list[Any]) -> SiloUpdate | Exception:
        """One answer, or why there is none; who died is made anew while the others go on."""
        try:
            meta: Any = ray.get(refs[0])
            body, rows = map(_held, refs[1:])
        except RayError as err:
            if not isinstance(err, RayTaskError):
                self.places.revive([name])
            return explain(err)
        for held in (body, rows):
            with suppress(DeptError):  # it is lost by now: who judges it will find that out
                _ = held and held.norm  # measured while others are still on their way
        return replace(meta, body=body, rows=rows)

    def _taken_up(self, orders: Mapping[str, RoundOrder], names: Iterable[str]) -> bool:
        """Whether all of them have copied what they were sent: until then memory is theirs, and the next step waits."""
        statuses = self.places.statuses()
        return all(
            statuses[name].round == orders[name].round and statuses[name].doing in ("scoring", "training", "saving")
            for name in names
        )

    def _stop(self, orders: Mapping[str, RoundOrder], calls: Mapping[str, _Call], names: Any) -> None:
        """Ask silos, once each, to hand in what they have."""
        for name in names:
            if name in calls and calls[name].stopped_at is None:
                calls[name].stopped_at = time.monotonic()
                self.places.actors[name].stop.remote(orders[name].round, orders[name].attempt)

    def _given_up(self, calls: dict[str, _Call], now: float) -> list[str]:
        """Who was asked to hand in, and did not; takes them out of `calls`."""
        mute = [n for n, call in calls.items() if call.stopped_at and now - call.stopped_at > self.job.faults.grace_s]
        for name in mute:
            del calls[name]
        return mute

    def _give_up(self, name: str, waited_s: float) -> SiloError:
        """Its answer, should it ever come, is to a question that nobody asks any more."""
        self.places.place_anew(name)
        return SiloError(f"late: no answer in {waited_s:.0f} s, {self.job.faults.grace_s:.0f} s of grace included")


def _arrived(call: _Call) -> bool:
    """Whether all of an answer is on this node."""
    while call.refs and ray.wait(call.refs[:1], timeout=0)[0]:
        call.refs.pop(0)
    return not call.refs


def _held(ref: Any) -> Held | None:
    """What arrived, left in the object store, which may put it on disk, until it is looked at."""
    if ray.get(ref) is None:
        return None

    def fetch() -> Delta:
        try:
            return ray.get(ref)
        except RayError as err:  # its node is gone, and no copy is left
            raise explain(err) from None

    return Held(fetch)
