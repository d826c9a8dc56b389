"""`RayPool`: a round on a cluster. Order the silos, wait, ask the late to hand in what they have, give up the mute.

The body is put into the object store once a round and read by every silo without a copy; deltas come back as return
values of their own, so they outlive their silo, and stay in the store until they are folded. An answer counts as there
once its arrays are: the deadline bounds the way home too. Where silos live is `places`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
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
from dept_ray.rounds.pool import (
    ANY_ATTEMPT,
    Deadline,
    MakeSilo,
    Meanwhile,
    beside,
    fence_of,
    nothing,
    specs_of,
    timed,
)
from dept_ray.sections import FaultsSection
from dept_ray.silo.silo import Silo

TAKING_UP_S = 5.0
"""How long what is done meanwhile waits for silos to take up their orders: who takes longer waits for a line."""

BEFORE_TRAINING = ("loading", "scoring", "compiling")
"""What a silo does of an order before its first step."""


@dataclass
class _Call:
    """An order on its way."""

    refs: list[Any]
    """Meta, body, rows: what has not arrived yet."""
    all_refs: list[Any]
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
        self._hurried = (-1, 0)
        """The last round and attempt whose silos are to hand in what they have."""
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
        stored = _Stored()
        stored.put(*orders.values())
        round = _Round(orders, self.places, lambda order, again: self._ask(order, stored, again), self.job.faults)
        fence = fence_of(orders)
        with beside(meanwhile) as work:
            while round.calls:
                work.look()
                if round.collect():
                    work.begin()
                if round.look_after(deadline, self._hurried >= fence):
                    work.begin()
        return timed(round.answers, round.asked_at, round.at)

    def hand_in(self, round: int, attempt: int = ANY_ATTEMPT) -> None:
        self._hurried = max(self._hurried, (round, attempt))

    def rest(self) -> None:
        for name in list(self._obeyed):
            self._end_ahead(name)

    def statuses(self) -> dict[str, SiloStatus]:
        return self.places.statuses()

    def failed(self) -> dict[str, str]:
        return {name: f"{type(err).__name__}: {err}" for name, err in dict(self.places.failed).items()}

    def close(self) -> None:
        self.places.close()

    def _ask(self, order: RoundOrder, stored: "_Stored", again: bool) -> list[Any]:
        """Send an order; what will be its answer. Who is asked `again` has no steps ahead to end."""
        body, rows = stored.put(order)
        if not again:
            self._end_ahead(order.silo, body, rows)
        silo = self.places.actors[order.silo]
        refs = silo.obey.remote(order.without_arrays(), body, rows)
        if self.job.inner.ahead_steps and order.steps:
            silo.go_ahead.remote()
            self._obeyed[order.silo] = order.without_arrays()
        return list(refs)

    def _end_ahead(self, name: str, *until: Any) -> None:
        """Its steps ahead end when it has what they wait for, on its own node: by then the line is the slow part.

        What it has made counts if its next order is the one it expects, and is made anew if it is not.
        """
        if (order := self._obeyed.pop(name, None)) is not None and name in self.places.actors:
            self.places.actors[name].stop.remote(order.round, order.attempt, *until)


class _Stored:
    """The arrays of a round's orders, each put where silos read it once for all who get the same."""

    def __init__(self) -> None:
        self._refs: dict[int, tuple[Any, Any]] = {}
        """By id: the array, which lives as long as its id is known, and where it is."""

    def put(self, *orders: RoundOrder) -> list[Any]:
        """Body and rows of each, as they are passed to a silo."""
        for vector in (vector for order in orders for vector in (order.body, order.rows) if vector is not None):
            if id(vector) not in self._refs:
                self._refs[id(vector)] = vector, ray.put(vector)
        return [self._refs.get(id(vector), (None, None))[1] for order in orders for vector in (order.body, order.rows)]


class _Round:
    """The orders of a round on their way.

    Who dies is made anew, and takes the same order once more while others are at theirs. It has the steps until they
    are done, and is asked to hand in what it has by then: nobody waits for it any longer than for one step.

    Args:
        orders: by silo.
        places: where silos live.
        ask: sends an order, for the first time or again.
        faults: for how long the mute are borne with.
    """

    def __init__(
        self, orders: Mapping[str, RoundOrder], places: Places, ask: Callable[[RoundOrder, bool], list[Any]],
        faults: FaultsSection,
    ) -> None:  # fmt: skip
        self._orders, self._places, self._ask, self._faults = orders, places, ask, faults
        self._began, self._looked = time.monotonic(), 0.0
        self.answers: dict[str, SiloUpdate | Exception] = {}
        self.asked_at: dict[str, float] = {}
        self.at: dict[str, float] = {}
        """When each answer, or the lack of one, was there."""
        self._lost: dict[str, str] = {}
        """Who died, and why: once each."""
        self._returning: set[str] = set()
        """Those of them who are being made anew."""
        self.calls = {name: self._call(order) for name, order in orders.items()}
        """Who has not answered yet."""

    def collect(self) -> bool:
        """Take what has arrived, once something has, or after a while; whether anything did."""
        ray.wait([call.refs[0] for call in self.calls.values()], timeout=LOOK_EVERY_S)
        arrived = [name for name, call in self.calls.items() if _arrived(call)]
        for name in arrived:
            self.answers[name] = self._answer(name, self.calls.pop(name).all_refs)
            self.at[name] = time.monotonic()
        return bool(arrived)

    def look_after(self, deadline: Deadline, hurried: bool) -> bool:
        """Those who are late, leave, are mute or come back; whether all have taken up their orders by now."""
        now = time.monotonic()
        if not self.calls or now - self._looked < LOOK_EVERY_S:
            return False
        self._looked = now
        self._places.poll(self.calls)
        took_s = [at - self._began for name, at in self.at.items() if name not in self._lost]
        late = hurried or now - self._began > deadline(took_s)
        self._stop(self.calls if late else self._places.leaving())
        for name in self._given_up(now):
            self.answers[name], self.at[name] = self._give_up(name, now), now
        if not late:
            self._ask_again()
        if self.calls and self.calls.keys() <= self._lost.keys():
            self._end_with_the_others()
        return self._taken_up or now - self._began > TAKING_UP_S

    def _call(self, order: RoundOrder, again: bool = False) -> _Call:
        self.asked_at[order.silo] = time.monotonic()
        refs = self._ask(order, again)
        return _Call(refs, list(refs))

    def _answer(self, name: str, refs: list[Any]) -> SiloUpdate | Exception:
        """What came, or why nothing did; who died is made anew while the others go on."""
        try:
            meta: Any = ray.get(refs[0])
            body, rows = map(_held, refs[1:])
        except RayError as err:
            reason = explain(err)
            if not isinstance(err, RayTaskError):
                self._places.revive([name])
                if name not in self._lost and not self._places.is_open(name):
                    self._returning.add(name)
                    self._lost[name] = f"{type(reason).__name__}: {reason}"
            return reason
        for held in (body, rows):
            with suppress(DeptError):  # it is lost by now: who judges it will find that out
                _ = held and held.norm  # measured while others are still on their way
        return replace(meta, body=body, rows=rows, lost=self._lost.get(name, ""))

    def _ask_again(self) -> None:
        """Give the order once more to who died and is back."""
        if self._returning:
            self._places.settle(0)
        for name in [name for name in self._returning if self._places.is_open(name)]:
            self._returning.remove(name)
            if (order := self._orders[name].from_nothing) is not None:  # else its answer is how it died
                self.calls[name] = self._call(order, again=True)

    def _end_with_the_others(self) -> None:
        """All others are done: who was asked again hands in what it has, or, if it has not begun, is not waited for."""
        statuses = self._places.statuses()
        for name in [name for name, call in self.calls.items() if call.stopped_at is None]:
            status, round = statuses[name], self._orders[name].round
            self._stop([name])
            if status.round < round or (status.round == round and status.doing in BEFORE_TRAINING):
                del self.calls[name]  # its answer is how it died

    @property
    def _taken_up(self) -> bool:
        """Whether all have copied what they were sent: until then memory is theirs, and the next step waits."""
        statuses = self._places.statuses()
        return all(
            statuses[name].round == self._orders[name].round
            and statuses[name].doing in ("scoring", "compiling", "training", "saving")
            for name in self.calls
        )

    def _stop(self, names: Iterable[str]) -> None:
        """Ask silos, once each, to hand in what they have."""
        for name in names:
            if name in self.calls and self.calls[name].stopped_at is None:
                self.calls[name].stopped_at = time.monotonic()
                self._places.actors[name].stop.remote(self._orders[name].round, self._orders[name].attempt)

    def _given_up(self, now: float) -> list[str]:
        """Who was asked to hand in, and did not; takes them out of the calls."""
        mute = [n for n, call in self.calls.items() if call.stopped_at and now - call.stopped_at > self._faults.grace_s]
        for name in mute:
            del self.calls[name]
        return mute

    def _give_up(self, name: str, now: float) -> SiloError:
        """Its answer, should it ever come, is to a question that nobody asks any more."""
        self._places.place_anew(name)
        grace_s = self._faults.grace_s
        return SiloError(f"late: no answer in {now - self._began:.0f} s, {grace_s:.0f} s of grace included")


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
