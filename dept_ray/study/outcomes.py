"""What became of a study's runs, as their folders say: nothing of it is kept anywhere else.

A run that failed (it diverged, or lost its quorum) is an outcome like any other: its folder has the reason in
`error.txt` until somebody takes the run up again.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from dept_ray.config import Job
from dept_ray.errors import StoreError, WrongRunError
from dept_ray.metrics import read_records
from dept_ray.rounds.folder import committed, in_progress, read_job, run_folder
from dept_ray.rounds.origin import find

Scores = dict[str, dict[str, Any]]
"""By source, as a record has them."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    phase: Literal["begun", "finished", "failed"]
    scores: Scores = field(default_factory=dict)
    """Of the last state that was measured; each with `held_out` where it is."""
    rounds: int = 0
    tokens: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    activation: float | None = None
    """L2 norm of activations when they were measured last, mean over silos; None: they were not."""

    @property
    def over(self) -> bool:
        return self.phase != "begun"

    @property
    def finished(self) -> bool:
        return self.phase == "finished"

    @property
    def worth(self) -> float:
        """Mean bits per byte in distribution: what a sweep goes by; infinite where the run failed."""
        bits = self.mean("bits_per_byte", held_out=False) if self.finished else None
        return math.inf if bits is None or math.isnan(bits) else bits

    @property
    def diverged(self) -> bool:
        """Whether the model knows less than its unigram model, or the run failed."""
        unigram = self.mean("unigram_bits_per_byte", held_out=False)
        return self.phase == "failed" or (unigram is not None and self.finished and not self.worth < unigram)

    def mean(self, figure: str, held_out: bool) -> float | None:
        """Mean over sources, each counting once (METHOD.md section 4); None: there are none."""
        found = [_number(s[figure]) for s in self.scores.values() if bool(s.get("held_out")) == held_out]
        return fmean(found) if found else None


def read_outcome(job: Job) -> Outcome | None:
    """What became of a job's run; None: it has committed no round and has not failed.

    Raises:
        WrongRunError: its folder holds a run of another job.
        StoreError: it cannot be read.
    """
    folder = run_folder(job)
    error = folder / "error.txt"
    failed = error.exists() and in_progress(folder) is None
    if not committed(folder) and not failed:
        return None
    _check_same(job)
    records = read_records(folder / "metrics.jsonl")
    rounds = [record for record in records if record["event"] == "round"]
    finished = bool(records) and records[-1]["event"] == "scores"
    scores = next((record["scores"] for record in reversed(records) if record.get("scores")), {})
    return Outcome(
        phase="finished" if finished else "failed" if failed else "begun",
        scores=scores,
        rounds=rounds[-1]["round"] if rounds else 0,
        tokens=rounds[-1]["tokens"] if rounds else 0,
        sent_bytes=sum(sum(record["sent_bytes"].values()) for record in rounds),
        seconds=sum(record["seconds"] for record in rounds),
        error=error.read_text() if failed and not finished else "",
        activation=_activation(rounds),
    )


def outcomes_of(jobs: Iterable[Job]) -> dict[str, Outcome]:
    """Of those that are over, by name.

    Raises:
        WrongRunError, StoreError: as `read_outcome`.
    """
    found = {job.name: read_outcome(job) for job in jobs}
    return {name: outcome for name, outcome in found.items() if outcome is not None and outcome.over}


def _check_same(job: Job) -> None:
    """Refuse the run of another job; what a run took from another (`rounds.origin`) is told when it begins."""
    file = run_folder(job) / "config.json"
    try:
        stored = json.loads(file.read_text())["identity"]
    except (OSError, ValueError, KeyError) as err:
        raise StoreError(f"{file} cannot be read ({err}): restore it, or delete the folder to run it again") from None
    ours = json.loads(json.dumps(job.identity))
    theirs = {**stored, "init": {**stored["init"], **{key: None for key in _TAKEN if ours["init"][key] is None}}}
    if differs := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise WrongRunError(
            f"run folder {file.parent} belongs to another study, or to this one before {', '.join(differs)} changed: "
            "give the study another `name`, or delete the folder to run it again"
        )


def check_origin(job: Job) -> None:
    """Refuse a finished adaptation of a body that was trained anew since.

    Raises:
        WrongRunError: it was.
        ConfigError, StoreError: the body cannot be read.
    """
    folder = run_folder(job)
    if job.init.origin is None or not committed(folder):
        return
    began_from, there = read_job(folder).init.fingerprint, find(job).about["fingerprint"]
    if began_from != there:
        raise WrongRunError(
            f"run folder {folder} adapted another body than {job.init.origin} has now (fingerprint {began_from}, now "
            f"{there}): delete the folder to adapt the new one"
        )


_TAKEN = ("round", "silo", "fingerprint")
"""Filled in when a run begins."""


def _activation(rounds: list[dict[str, Any]]) -> float | None:
    last = [norms["activation"][-1] for r in rounds[-1:] for s in r["silos"].values() if (norms := s.get("norms"))]
    return fmean(map(_number, last)) if last else None


def _number(value: float | None) -> float:
    """A record says None where a figure was not finite."""
    return math.nan if value is None else float(value)
