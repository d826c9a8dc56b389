"""`MailboxPool`: silos behind other regions' walls, reached by letters in a bucket: nobody connects to anybody.

    run                                  the coordinator's word: which job, which opening of it, whether it is closed
    <region>/beat                        the region's word, written anew at each look: silos, statuses, orders done
    <region>/card-<silo>                 who a silo is
    <region>/order-<opening>-<n>         a round, for all its silos at once
    <region>/stop-<opening>-<n>          hand in what you have
    <region>/update-<opening>-<n>-<silo> one silo's answer, or why there is none

An opening is a word drawn whenever a coordinator takes the run up: letters of an earlier one are nobody's, and swept
away. A letter that was dealt with is deleted; a closed run leaves `run` alone, which says so. Regions need no clock in
common: one is cut off when its beat has not changed for `regions.silent_s` on the coordinator's own.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ClusterError, ConfigError, RunError, SiloError, StoreError, WrongRunError
from dept_ray.messages import RoundOrder, SiloCard, SiloStatus, SiloUpdate
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.methods import method_of, resources_of, silos_of
from dept_ray.rounds.pool import ANY_ATTEMPT, Deadline, Meanwhile, fence_of, nothing, timed
from dept_ray.rounds.regions import check_regions

RUN, BEAT = "run", "beat"


@dataclass(frozen=True)
class _Region:
    """The last word of a region."""

    beat: dict[str, Any]
    heard_at: float
    given: int = 0
    """The last order that this agent was given and that was not given up."""


class MailboxPool:
    """The silos of a job, wherever an agent (`rounds.agent`) serves them.

    Args:
        clock, sleep: seconds, and waiting for some.
        reach: opens the mailbox that a job names.
    """

    remote = True

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
        reach: Callable[[str], Mailbox] = Mailbox,
    ) -> None:  # fmt: skip
        self.clock, self.sleep, self.reach = clock, sleep, reach
        self.box: Mailbox | None = None
        self.opening = secrets.token_hex(4)
        self._regions: dict[str, _Region] = {}
        self._cards: dict[str, SiloCard] = {}
        self._digests: dict[str, str] = {}
        self._looked_at = clock()
        self._number = self._words = 0
        self._waited_for: dict[str, int] = {}
        self._hurried = (-1, 0)
        """The last round and attempt whose silos are to hand in what they have."""

    @property
    def cards(self) -> dict[str, SiloCard]:
        return dict(self._cards)

    # ------------------------------------------------------------------------------------------ opening, closing
    def open(self, job: Job, first: Job) -> None:
        check_regions(job)
        assert job.regions.mailbox is not None
        self.job, self.first, box = job, first, self.reach(job.regions.mailbox)
        self._sweep(box)
        self.box = box
        self._tell()
        self._wait_for_silos()

    def add(self, job: Job, silo: str) -> None:
        check_regions(job)
        self.job = job
        self._tell()

    def close(self) -> None:
        if self.box is None:
            return
        with suppress(StoreError):  # whoever opens the mailbox next sweeps it
            self._tell(closed=True)
            for name in self.box.names():
                if name != RUN:
                    self.box.delete(name)

    def _sweep(self, box: Mailbox) -> None:
        """Take away what an earlier life, or an earlier run, left behind; nothing that is not a mailbox's.

        Raises:
            ConfigError: other things are there.
            WrongRunError: another run is in progress there.
        """
        names, said = box.names(), box.read(RUN)
        if said is None and names:
            raise ConfigError(
                f"regions.mailbox: {box.uri} holds other things ({', '.join(names[:3])}), and a mailbox is swept: name "
                "a folder or prefix for this job alone"
            )
        if said is not None and not said["closed"] and said["run"] != self.job.name:
            raise WrongRunError(
                f"mailbox {box.uri} is run {said['run']}'s: give this one another prefix (regions.mailbox) or, if that "
                "run will never go on, delete all that is there"
            )
        for name in names:
            if name != RUN:
                box.delete(name)

    def _tell(self, closed: bool = False) -> None:
        jobs = {} if closed else {"job": self.job.model_dump_json(), "first": self.first.model_dump_json()}
        self._words += 1
        about = {"run": self.job.name, "opening": self.opening, "word": self._words, "closed": closed}
        self._open_box.write(RUN, about | jobs)

    def _wait_for_silos(self) -> None:
        """Wait for those whose regions are there; the others may come later, as on a cluster.

        Raises:
            DeptError: one cannot open its data; none is there.
        """
        faults, moved, seen = self.job.faults, self.clock(), -1
        joined = {source.name for source in self.job.sources if source.joined}
        while missing := silos_of(self.job).keys() - self._there():
            self._look()
            errors = self._errors()
            if lost := errors.keys() - joined:  # one that joined, and cannot, was never needed
                raise errors[min(lost)]
            phases = {self._regions[home].beat["phase"] for silo in missing if (home := self._home(silo)) is not None}
            if len(self._cards) != seen or "preparing" in phases:
                seen, moved = len(self._cards), self.clock()  # reading text may take hours
            waited_s = self.clock() - moved
            if self._cards and phases <= {"open"} and waited_s > faults.patience_s:
                break  # who is still missing has no region, or no place in it
            if waited_s > faults.start_timeout_s:
                break
            self.sleep(self.job.regions.look_every_s)
        if not self._cards:
            wishes = "; ".join(f"{name}: {resources_of(self.job, name).labels}" for name in silos_of(self.job))
            raise ClusterError(
                f"no silo answered through mailbox {self._open_box.uri} within faults.start_timeout_s = "
                f"{faults.start_timeout_s:g} s ({wishes}): start `dept-ray region --mailbox ... --labels ...` in each "
                "region"
            )
        self._check_tokenizers()

    # ------------------------------------------------------------------------------------------ who is there
    def ready(self) -> set[str]:
        began, faults = self.clock(), self.job.faults
        while True:
            self._look()
            there, waited_s = self._there(), self.clock() - began
            busy = {name: region.given for name, region in self._regions.items() if self._busy(name)}
            if waited_s > faults.patience_s:
                self._waited_for |= busy  # once for each order that they do not come back from
            patient = any(self._waited_for.get(name) != given for name, given in busy.items())
            if (there and not patient) or waited_s > faults.start_timeout_s:
                self._check_tokenizers()
                return there
            self.sleep(self.job.regions.look_every_s)

    def statuses(self) -> dict[str, SiloStatus]:
        told: dict[str, SiloStatus] = {}
        for name, region in dict(self._regions).items():
            for silo, status in region.beat["statuses"].items():
                told[silo] = replace(status, doing="out of reach") if self._silent(name) else status
        return told

    def failed(self) -> dict[str, str]:
        silent = {
            silo: f"region {name} is silent: cut off, or its agent is gone"
            for name, region in dict(self._regions).items()
            for silo in region.beat["silos"]
            if self._silent(name)
        }
        return silent | {silo: f"{type(err).__name__}: {err}" for silo, err in self._errors().items()}

    def _look(self) -> None:
        """Hear what every region says; what cannot be read now may be later."""
        box = self._open_box
        names: list[str] = []
        with suppress(StoreError):
            names = [name for name in box.names() if name != RUN]
        for name in names:
            with suppress(RunError):
                beat, known = box.read(f"{name}/{BEAT}"), self._regions.get(name)
                if beat is None or beat["opening"] != self.opening:
                    continue
                if known is None or beat != known.beat:
                    same = known is not None and known.beat["agent"] == beat["agent"]
                    self._regions[name] = _Region(beat, self.clock(), known.given if known and same else 0)
                for silo, digest in beat["cards"].items():
                    if self._digests.get(silo) != digest and (card := box.read(f"{name}/card-{silo}")) is not None:
                        self._cards[silo], self._digests[silo] = card, digest
        self._looked_at = self.clock()

    def _there(self) -> set[str]:
        """Those that can take an order now."""
        there = set[str]()
        for name, region in self._regions.items():
            if not self._silent(name) and not self._busy(name):
                there |= {silo for silo in region.beat["ready"] if silo in self._cards and self._home(silo) == name}
        return there

    def _home(self, silo: str) -> str | None:
        """The region that has a silo, those that can be heard before those that cannot."""
        names = [name for name, region in self._regions.items() if silo in region.beat["silos"]]
        return min(names, key=lambda name: (self._silent(name), name), default=None)

    def _silent(self, name: str) -> bool:
        """Whether nothing new was heard from it for long, when somebody listened last."""
        return self._looked_at - self._regions[name].heard_at > self.job.regions.silent_s

    def _busy(self, name: str) -> bool:
        """Whether a region that can be heard is still at an order, or has not said yet that it no longer is."""
        region = self._regions[name]
        done = region.beat["done"]
        return not self._silent(name) and done < max(region.given, region.beat["begun"])

    def _errors(self) -> dict[str, Exception]:
        return {silo: err for region in dict(self._regions).values() for silo, err in region.beat["failed"].items()}

    def _check_tokenizers(self) -> None:
        """Where rows are shared, one id must mean one token in all regions.

        Raises:
            SiloError: it does not.
        """
        digests = {name: region.beat["tokenizer"] for name, region in self._regions.items() if region.beat["cards"]}
        if method_of(self.job).share_rows != "none" and len(set(digests.values())) > 1:
            raise SiloError(
                f"the regions have different tokenizers under tokenizer.name = {self.job.tokenizer.name!r} (digests "
                f"{digests}): give all of them the same file"
            )

    @property
    def _open_box(self) -> Mailbox:
        assert self.box is not None, "used before it was opened"
        return self.box

    # ------------------------------------------------------------------------------------------ a round
    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self._number += 1
        answers, at = dict[str, SiloUpdate | Exception](), dict[str, float]()
        asked_at, agents = dict[str, float](), dict[str, str]()
        out: dict[str, str] = {}
        by_region = self._by_region(orders)
        for region, silos in by_region.items():
            reason = self._send(region, {silo: orders[silo] for silo in silos})
            for silo in silos:
                asked_at[silo] = at[silo] = self.clock()
                if reason is None and region is not None:
                    agents[region], out[silo] = self._regions[region].beat["agent"], region
                else:
                    answers[silo] = reason or SiloError("no region has it now")
        began, stopped_at, fence = self.clock(), None, fence_of(orders)
        meanwhile()
        while out:
            self._look()
            came, listed = self._collect(out)
            now = self.clock()
            took_s = [at[silo] - began for silo in answers.keys() - out.keys()]
            if stopped_at is None and (self._hurried >= fence or now - began > deadline(took_s)):
                stopped_at = now
                self._stop(set(out.values()))
            lost = {name: self._lost(name, agents[name], stopped_at, name in listed) for name in set(out.values())}
            gone = {silo: SiloError(reason) for silo, name in out.items() if (reason := lost[name])}
            for name in {out[silo] for silo in gone}:
                self._regions[name] = replace(self._regions[name], given=0)
            for silo, answer in {**gone, **came}.items():
                answers[silo], at[silo] = answer, now
                del out[silo]
            if out:
                self.sleep(self.job.regions.look_every_s)
        self._withdraw(region for region in by_region if region is not None)  # a letter may be there that failed
        return timed(answers, asked_at, at)

    def hand_in(self, round: int, attempt: int = ANY_ATTEMPT) -> None:
        self._hurried = max(self._hurried, (round, attempt))

    def rest(self) -> None:
        """Regions are not asked: what goes ahead there ends by itself, with the steps that the job allows."""

    def _by_region(self, silos: Iterable[str]) -> dict[str | None, list[str]]:
        found: dict[str | None, list[str]] = {}
        for silo in silos:
            found.setdefault(self._home(silo), []).append(silo)
        return found

    def _letter(self, kind: str, *more: str) -> str:
        return "-".join((kind, self.opening, str(self._number), *more))

    def _send(self, region: str | None, orders: Mapping[str, RoundOrder]) -> StoreError | None:
        """Give a region its orders; why they could not be given."""
        if region is None:
            return None
        known = self._regions[region]
        try:
            message = {
                "agent": known.beat["agent"],
                "number": self._number,
                "orders": {name: replace(order, whole=None) for name, order in orders.items()},
            }
            self._open_box.write(f"{region}/{self._letter('order')}", message)
        except StoreError as err:
            return err
        self._regions[region] = replace(known, given=self._number)
        return None

    def _stop(self, regions: Iterable[str]) -> None:
        for region in regions:
            with suppress(StoreError):
                self._open_box.write(f"{region}/{self._letter('stop')}", {"number": self._number})

    def _collect(self, out: Mapping[str, str]) -> tuple[dict[str, SiloUpdate | Exception], set[str]]:
        """The answers that have come, and the regions that were looked at. What is read, or comes too late, goes."""
        box, came, listed = self._open_box, dict[str, SiloUpdate | Exception](), set[str]()
        mine = {self._letter("update", silo): silo for silo in out}
        for region in set(out.values()):
            with suppress(StoreError):
                for name in [name for name in box.names(region) if name.startswith("update-")]:
                    silo = mine.get(name)
                    if silo is not None and out[silo] == region:
                        came[silo] = self._read(f"{region}/{name}", silo)
                    box.delete(f"{region}/{name}")
                listed.add(region)
        return came, listed

    def _read(self, path: str, silo: str) -> SiloUpdate | Exception:
        try:
            answer = self._open_box.read(path)
        except SiloError as err:
            return err
        known = isinstance(answer, SiloUpdate | Exception)
        return answer if known else SiloError(f"silo {silo} answered with a {type(answer).__name__}")

    def _lost(self, region: str, agent: str, stopped_at: float | None, listed: bool) -> str | None:
        """Why a region's answers will not come; None: they may."""
        faults, settings, beat = self.job.faults, self.job.regions, self._regions[region].beat
        if self._silent(region):
            return f"region {region} has been silent for {settings.silent_s:g} s: cut off, or its agent is gone"
        if beat["agent"] != agent:
            return f"region {region}: its agent was started anew, and the order died with the last one"
        if listed and beat["done"] >= self._number:  # its answers were written before it said so
            return f"region {region}: it sent no answer"
        grace_s = faults.grace_s + settings.silent_s  # for its silos, and for the way
        if stopped_at is not None and self.clock() - stopped_at > grace_s:
            return f"late: no answer from region {region} within {grace_s:g} s of grace"
        return None

    def _withdraw(self, regions: Iterable[str]) -> None:
        for region in regions:
            for kind in ("order", "stop"):
                with suppress(StoreError):
                    self._open_box.delete(f"{region}/{self._letter(kind)}")
