"""What became of a run, told by its records: curves, bytes, comings and goings, and what it is worth now.

Reads `config.json` and `metrics.jsonl` only (schema: `rounds.ledger`), so a run in progress is told as far as it got.
Draws nothing.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.metrics import Record
from dept_ray.rounds.changes import DROPPED, changed
from dept_ray.study.plan import plan

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Worth:
    """The latest validation of one source."""

    round: int
    """Rounds that the measured state had behind it."""
    score: dict[str, Any]
    """As the record has it: loss, bits_per_byte, ..."""
    counts: bool
    """Whether it is in the mean: the source is trained on, and still takes part."""

    @property
    def why_not(self) -> str:
        """Why it does not count; empty where it does."""
        return "" if self.counts else "held out" if self.score.get("held_out") else "away since"


@dataclass(frozen=True)
class Event:
    """Something that people asked for, or that befell a silo."""

    round: int
    """The round it came in, or the one after which people asked."""
    who: str
    what: str
    why: str = ""
    bad: bool = False
    """Whether an answer was lost by it."""


@dataclass(frozen=True)
class Story:
    """One run as far as it got.

    Args:
        name: to be shown; of several runs each has its own.
        first: the job as the run began.
        records: all of them, in order.
        phase: as `messages.RunStatus`.
        error: why it failed.
    """

    name: str
    first: Job
    records: tuple[Record, ...]
    phase: str = ""
    error: str = ""

    @property
    def job(self) -> Job:
        """The job with all that people changed while it ran."""
        return changed(self.first, [r["change"] for r in self.records if r["event"] == "change" and "refused" not in r])

    @property
    def rounds(self) -> list[Record]:
        """The records of committed rounds."""
        return [record for record in self.records if record["event"] == "round"]

    # ------------------------------------------------------------------------------------------ over rounds
    def of_silos(self, key: str) -> dict[str, Points]:
        """One figure of each silo's rounds, such as loss, norm or cosine: (round, value).

        A nan stands where the silo was away: no line is to be drawn across. Rounds that it was not chosen for, or that
        its answer did not count in, are left out.
        """
        found: dict[str, Points] = {}
        for record in self.rounds:
            for name, silo in record["silos"].items():
                value = silo.get(key)
                if value is not None:
                    found.setdefault(name, []).append((record["round"], float(value)))
            for name in record.get("away", {}):
                if name in found and math.isfinite(found[name][-1][1]):
                    found[name].append((record["round"], math.nan))
        return found

    def norms(self, what: str) -> dict[str, Points]:
        """The `body`'s, the `embedding`'s or the `activation`'s L2 norm in each silo: (global inner step, value)."""
        found: dict[str, Points] = {}
        for record in self.rounds:
            for name, silo in record["silos"].items():
                if norms := silo.get("norms"):
                    points = zip(norms["step"], map(_number, norms[what]), strict=True)
                    found.setdefault(name, []).extend(points)
        return found

    def bits(self) -> dict[str, Points]:
        """Bits per byte of each source: (rounds behind the measured state, value).

        A round's scores were measured before its training, so they are of the round before. A nan where it was away.
        """
        found: dict[str, dict[float, float]] = {}
        for record in self.records:
            for source, score in record.get("scores", {}).items():
                found.setdefault(source, {})[measured(record)] = _number(score["bits_per_byte"])
            for source in record.get("away", {}).keys() & found.keys():
                found[source].setdefault(measured(record), math.nan)
        return {source: list(points.items()) for source, points in sorted(found.items())}

    def mean_bits(self) -> Points:
        """The mean over the sources that were measured together: (rounds behind the measured state, bits per byte)."""
        found = {measured(r): _number(r["mean"]["bits_per_byte"]) for r in self.records if r.get("scores")}
        return list(found.items())

    # ------------------------------------------------------------------------------------------ bytes
    def sent(self) -> list[tuple[int, int, int]]:
        """Bytes of each round: (round, down to the silos, up from them)."""
        return [(r["round"], r["sent_bytes"]["down"], r["sent_bytes"]["up"]) for r in self.rounds]

    def data_parallel_bytes(self) -> Points | None:
        """What a gradient exchange at each step would have sent so far, both ways: (round, bytes).

        Of the same model with the global vocabulary, a worker a silo, for as many steps as were really made (a mixed
        silo's as one worker's). None where no global vocabulary is declared, so that there is no such model.
        """
        try:
            parallel = plan(self.first).data_parallel
        except ConfigError:
            return None
        if parallel is None:
            return None
        so_far, points = 0.0, Points()
        for record in self.rounds:
            so_far += parallel.step_bytes * sum(silo["steps"] for silo in record["silos"].values())
            points.append((record["round"], so_far))
        return points

    # ------------------------------------------------------------------------------------------ now
    def worth(self) -> dict[str, Worth]:
        """The latest validation of every source that was ever measured."""
        away = self.rounds[-1].get("away", {}) if self.rounds else {}
        return {
            source: Worth(measured(record), score, source not in away and not score.get("held_out"))
            for record in self.records
            for source, score in sorted(record.get("scores", {}).items())
        }

    def mean_worth(self) -> float | None:
        """Mean bits per byte over the sources that still take part; None: nothing is measured."""
        bits = [_number(worth.score["bits_per_byte"]) for worth in self.worth().values() if worth.counts]
        return fmean(bits) if bits else None

    def events(self) -> list[Event]:
        """Comings and goings, changes, and answers that did not count, in order."""
        events, known, gone = list[Event](), set[str](), dict[str, str]()
        for record in self.records:
            at = record["round"]
            if record["event"] == "change":
                events.append(_asked(at, record))
            if record["event"] != "round":
                continue
            for attempt in record.get("failed", []):
                what = f"lost in attempt {attempt['attempt'] + 1}"
                events += [Event(at, silo, what, why, bad=True) for silo, why in attempt["refused"].items()]
            events += [Event(at, silo, "answer refused or lost", why, bad=True)
                       for silo, why in record["refused"].items()]  # fmt: skip
            events += [Event(at, name, f"made anew, {silo['steps']} steps since", silo["lost"], bad=True)
                       for name, silo in record["silos"].items() if silo.get("lost")]  # fmt: skip
            away = record.get("away", {})
            # Who was dropped was dropped by people, which stands there already.
            events += [
                Event(at, silo, "away", why) for silo, why in away.items() if why not in (DROPPED, gone.get(silo))
            ]
            for silo in record["silos"]:
                if silo in gone:
                    events.append(Event(at, silo, "trains again"))
                elif known and silo not in known:
                    events.append(Event(at, silo, "trains for the first time"))
            known |= record["silos"].keys()
            gone = {silo: why for silo, why in {**gone, **away}.items() if silo not in record["silos"]}
        return events


def measured(record: Record) -> int:
    """How many rounds the state that a record's scores are of had behind it."""
    return record["round"] - (record["event"] == "round")


def _number(value: float | None) -> float:
    """A record says None where a figure was not finite."""
    return math.nan if value is None else float(value)


def _asked(at: int, record: Record) -> Event:
    """What people asked for, in words."""
    change, why = record["change"], "people asked"
    if "refused" in record:
        why = f"people asked; refused: {record['refused']}"
    if "set" in change:
        return Event(at, "", f"{change['set']} = {change.get('to')}", why)
    if "add" in change:
        return Event(at, change["add"]["name"], "joins", why)
    what, who = next(iter(change.items()))
    return Event(at, str(who), {"drop": "dropped", "return": "returns"}.get(what) or what, why)
