"""What goes wrong, at the moment it is told to: a plan, and silos in this process that die, are late and lie by it.

A `Faults` names what happens when; each fault happens once. Nothing sleeps and nothing is drawn here: who wants chance
draws the plan (tests/rounds/test_random_ordeals.py). The run that lives through it, and the coordinator's deaths, are
in tests/lives.py.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dept_ray.codec import Coded, encode
from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.errors import SiloError
from dept_ray.messages import Change, RoundOrder, SiloUpdate
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing, specs_of
from dept_ray.silo.silo import Silo

Moment = tuple[int, int, str]
"""(round, attempt, silo) of an order."""

DEATHS = ("before", "within", "after")
"""A silo dies before it trains, between two steps, or after its snapshot and before its answer."""
POISONS = {
    "nan": "not finite|loss: nan",
    "noise": "times the round's median",
    "hundredfold": "times the round's median",
    "wrong round": "asked was",
    "wrong shape": "asked was",
    "duplicate": "asked was",
    "empty": "trained no token",
}
"""What a liar sends, and what is said of it."""
_TOO_LARGE = ("noise", "hundredfold")
COORDINATOR_DEATHS = (
    "before the orders", "before the outer step", "before any file", "before the manifest", "before the log line",
    "within the log line", "after the log line", "after a change",
)  # fmt: skip
"""Commit steps; "after a change" is before the round in which it takes effect."""
CORRUPTIONS = ("altered tensor", "truncated tensor", "missing tensor", "truncated manifest")


@dataclass
class Faults:
    """A plan: what happens when. Rounds are an order's (0 is the first); what people ask and what disks do by round."""

    dies_at: dict[Moment, str] = field(default_factory=dict)
    """One of `DEATHS`."""
    late_at: dict[Moment, int | None] = field(default_factory=dict)
    """Steps that it hands in when it is asked to stop; None: it never answers and is made anew."""
    poisons_at: dict[Moment, str] = field(default_factory=dict)
    """One of `POISONS`."""
    raises_at: set[Moment] = field(default_factory=set)
    """An exception after the first step."""
    absent_at: set[tuple[int, str]] = field(default_factory=set)
    """It is being placed anew while that round begins."""
    joins_at: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The table of a source."""
    drops_at: dict[int, str] = field(default_factory=dict)
    returns_at: dict[int, str] = field(default_factory=dict)
    sets_at: dict[int, tuple[str, Any]] = field(default_factory=dict)
    coordinator_dies_at: dict[int, str] = field(default_factory=dict)
    """One of `COORDINATOR_DEATHS`."""
    disk_full_at: dict[int, str] = field(default_factory=dict)
    """"run" or a silo's name, for all of the round."""
    corrupts_at: dict[int, str] = field(default_factory=dict)
    """After so many committed rounds someone stops the run and damages the newest: one of `CORRUPTIONS`."""

    def changes(self, round: int) -> list[Change]:
        """What people ask for once so many rounds are committed; each is asked once."""
        asked: list[Change] = []
        if round in self.joins_at:
            asked.append({"add": self.joins_at.pop(round)})
        if round in self.drops_at:
            asked.append({"drop": self.drops_at.pop(round)})
        if round in self.returns_at:
            asked.append({"return": self.returns_at.pop(round)})
        if round in self.sets_at:
            key, value = self.sets_at.pop(round)
            asked.append({"set": key, "to": value})
        return asked


class TracedPool(LocalPool):
    """A `LocalPool` that knows its job and which batches each silo read for each order."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[Moment, list[str]] = {}
        self.orders: dict[Moment, RoundOrder] = {}
        self._early: dict[str, list[str]] = {}
        """By silo, the batches that it last read ahead of an order."""
        self._going_ahead = False

    def open(self, job: Job, first: Job) -> None:
        super().open(job, first)
        self.job = job
        for name in self.silos:
            self._trace(name)

    def add(self, job: Job, silo: str) -> None:
        known = silo in self.silos
        super().add(job, silo)
        self.job = job
        if not known:
            self._trace(silo)

    def make_anew(self, name: str) -> None:
        """Its process is gone, and with it all that was in memory."""
        self.silos[name].stream.close()
        self.silos[name] = Silo(self.job, specs_of(self.job, self.first)[name])
        self._trace(name)

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self._asked = dict(orders)
        self.orders |= {(order.round, order.attempt, name): order for name, order in orders.items() if order.steps}
        return super().run_round(orders, deadline, meanwhile)

    def between_steps(self, moment: Moment, steps: int) -> None:
        """Called with the steps that were done, before the next one's batch is handed out."""

    def _trace(self, name: str) -> None:
        silo = self.silos[name]
        batches = silo.stream.batches

        def traced(position: dict[str, int], steps: int) -> Iterator[np.ndarray]:
            if self._going_ahead:
                self._early[name] = []
                for batch in batches(position, steps):
                    self._early[name].append(checksum(np.ascontiguousarray(batch)))
                    yield batch
                return
            order = self._asked[name]
            moment = (order.round, order.attempt, name)
            made = (sum(position.values()) - sum(order.position.values())) // silo.stream.batch_size
            self.reads[moment] = self._early.get(name, [])[:made]
            for done, batch in enumerate(self._limited(moment, batches(position, steps)), made):
                self.between_steps(moment, done)
                self.reads[moment].append(checksum(np.ascontiguousarray(batch)))
                yield batch

        silo.stream.batches = traced

    def _limited(self, moment: Moment, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return batches

    def go_ahead(self, order: RoundOrder) -> None:
        """As on a cluster: who has answered makes steps of the next round; every other time it is stopped early."""
        silo = self.silos[order.silo]
        if order.round % 2:
            silo.stop(order.round, order.attempt)  # it makes one step all the same
        self._going_ahead = True
        silo.go_ahead()
        self._going_ahead = False


class FaultyPool(TracedPool):
    """Silos that die, are late, raise and lie as planned; `lost` says of each order why its answer must not count.

    Where it is `remote` all of them have trained a round before the one before it is committed.
    """

    def __init__(
        self, faults: Faults, lost: dict[Moment, str], reads: dict[Moment, list[str]], remote: bool = False
    ) -> None:
        super().__init__()
        self.faults, self.lost, self.reads, self.remote = faults, lost, reads, remote
        self.round = 0
        self._last: dict[str, SiloUpdate] = {}

    def ready(self) -> set[str]:
        return super().ready() - {name for round, name in self.faults.absent_at if round == self.round}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self._asked = dict(orders)
        if not any(order.steps for order in orders.values()):
            return super().run_round(orders, deadline, meanwhile)
        first = next(iter(orders.values()))
        for moment in [m for m in self.lost if m[:2] == (first.round, first.attempt)]:
            del self.lost[moment]  # of an earlier life, in which the same attempt was made
        answers = {name: answer for name, order in orders.items() if (answer := self._obey(order)) is not None}
        meanwhile()
        return self._poisoned(orders, answers)

    def _obey(self, order: RoundOrder) -> SiloUpdate | Exception | None:
        name, moment = order.silo, (order.round, order.attempt, order.silo)
        self.orders[moment] = order
        death = self.faults.dies_at.pop(moment, "")
        mute = self.faults.late_at.get(moment, 0) is None
        if death == "before":
            self.make_anew(name)
            return self._lose(moment, SiloError("ActorDied: before it trained"), "ActorDied")
        self._dies_within = death == "within"
        try:
            answer = self.silos[name].obey(order)
        except Exception as err:  # noqa: BLE001, as on Ray: whatever happens in a silo is an answer
            if death:
                self.make_anew(name)
            return self._lose(moment, err, type(err).__name__)
        if death == "after":
            self.make_anew(name)
            return self._lose(moment, SiloError("ActorDied: before it answered"), "ActorDied")
        if mute:
            del self.faults.late_at[moment]
            self.make_anew(name)
            return self._lose(moment, None, "no answer")
        if not answer.tokens:
            self.lost[moment] = "trained no token"
        self.go_ahead(order)
        return answer

    def _lose(self, moment: Moment, answer: Exception | None, word: str) -> Exception | None:
        self.lost[moment] = word
        return answer

    def between_steps(self, moment: Moment, steps: int) -> None:
        silo = self.silos[moment[2]]
        if steps == 1 and moment in self.faults.raises_at:
            self.faults.raises_at.discard(moment)
            raise RuntimeError("out of memory")
        if steps == 1 and self._dies_within:
            raise SiloError("ActorDied: while it trained")
        limit = self.faults.late_at.get(moment)
        if limit is not None and steps == limit:
            del self.faults.late_at[moment]
            silo.stop(*moment[:2])

    def _poisoned(
        self, orders: Mapping[str, RoundOrder], answers: dict[str, SiloUpdate | Exception]
    ) -> dict[str, SiloUpdate | Exception]:
        lies = {moment: self.faults.poisons_at.pop(moment) for moment in self._moments(orders, answers)}
        honest = {name: answer for name, answer in answers.items() if isinstance(answer, SiloUpdate)}
        for moment, how in sorted(lies.items(), key=lambda lie: lie[1] in _TOO_LARGE):  # those last
            fine = {name for name in honest if (*moment[:2], name) not in self.lost}
            if how in _TOO_LARGE and (len(fine) < 3 or honest[moment[2]].body is None):
                how = "nan"  # only a majority can tell what is too large
            answers[moment[2]] = poisoned(honest[moment[2]], how, self._last.get(moment[2]))
            self.lost[moment] = POISONS[how]
        self._last |= honest
        return answers

    def _moments(self, orders: Mapping[str, RoundOrder], answers: Mapping[str, object]) -> list[Moment]:
        """Of those who have an honest answer and are to lie."""
        moments = [(order.round, order.attempt, name) for name, order in orders.items()]
        return [m for m in moments if m in self.faults.poisons_at and m not in self.lost and m[2] in answers]


class Recording(LocalPool):
    """Keeps the answers by round and silo; may bend them."""

    def __init__(self, liar: str = "", how: str = "", absent: str = "") -> None:
        super().__init__()
        self.updates: dict[tuple[int, str], SiloUpdate] = {}
        self.liar, self.how, self.absent = liar, how, absent

    def ready(self) -> set[str]:
        return super().ready() - {self.absent}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        answers = super().run_round(orders, deadline, meanwhile)
        for name, answer in answers.items():
            if isinstance(answer, SiloUpdate) and answer.tokens:
                self.updates[answer.round, name] = answer
                if name == self.liar:
                    answers[name] = poisoned(answer, self.how)
        return answers


def poisoned(update: SiloUpdate, how: str, last: SiloUpdate | None = None) -> SiloUpdate:
    """A lie instead of an answer; where no array is sent the liar lies in the fields that are."""
    if how == "wrong round":
        return replace(update, round=update.round - 1)
    if how == "duplicate":
        return last or replace(update, run="another")
    sent = {what: vector for what in ("body", "rows") if (vector := getattr(update, what)) is not None}
    if not sent and how in ("nan", "wrong shape"):
        return replace(update, loss=float("nan")) if how == "nan" else replace(update, silo="nobody")
    draw = np.random.default_rng(update.round)

    def lie(array: np.ndarray) -> np.ndarray:
        if how == "empty":
            return np.zeros_like(array)
        if how == "wrong shape":
            return array[:-1]
        if how == "nan":
            array.flat[-1] = np.nan
            return array
        if how == "hundredfold":
            return np.float32(100) * array
        noise = draw.standard_normal(array.shape).astype(np.float32)
        size = {"noise": 100, "quiet noise": 1}[how]
        return noise * np.float32(size * np.linalg.norm(array) / np.linalg.norm(noise))

    none = {"tokens": 0, "steps": 0} if how == "empty" else {}
    return replace(update, **none, **{what: _retold(vector, lie) for what, vector in sent.items()})


def _retold(vector: np.ndarray | Coded, lie: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | Coded:
    """A delta with other values, coded as it was."""
    if not isinstance(vector, Coded):
        return lie(vector.copy())
    with np.errstate(invalid="ignore"):
        return encode(np.ascontiguousarray(lie(vector.decode())), vector.codec)[0]
