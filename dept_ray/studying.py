"""A study from its first run to its last table, wherever its runs train.

Each run is an ordinary one (`client.Run`, or in this process). What is finished is left alone, what failed is a result,
and what was cut off goes on: the same call again does the rest.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.errors import RunError, StoreError, WrongRunError
from dept_ray.in_process import train_here
from dept_ray.reporting import write_report
from dept_ray.rounds.folder import in_progress, in_words, run_folder
from dept_ray.study.cells import Cell, cells_of
from dept_ray.study.outcomes import Outcome, check_origin, outcomes_of
from dept_ray.study.study_file import Study
from dept_ray.study.study_table import as_json, markdown
from dept_ray.text.shards import write_atomically

_LOOK_EVERY_S = 0.5
Train = Callable[[Sequence[Job]], Generator[tuple[Job, str]]]
"""Trains jobs to their last rounds, and yields each when it is over, with the reason if it failed."""
Tell = Callable[[str], None]


def silent(words: str) -> None:
    """Tells nobody."""


def known(study: Study, told: Mapping[str, Outcome] | None = None) -> tuple[list[Cell], dict[str, Outcome]]:
    """The cells that are known, and the outcomes of those that are over.

    Args:
        study: whose.
        told: outcomes that are known already: what is over stays as it is, so those runs are not read again.

    Raises:
        ConfigError: the study does not describe jobs.
        WrongRunError, StoreError: a run's folder is another's, or cannot be read.
    """
    outcomes = dict(told or {})
    read = set(outcomes)
    while True:
        cells = cells_of(study, outcomes)
        new = [cell.job for cell in cells if cell.name not in read]
        if not new:
            return cells, outcomes
        read |= {job.name for job in new}
        outcomes |= outcomes_of(new)


def run_study(study: Study, train: Train, retry: bool = False, tell: Tell = silent) -> None:
    """Run what is not over yet.

    Args:
        study: what to run.
        train: `here`, or `on_ray`.
        retry: run again what failed.
        tell: called with a line when a run is over.

    Raises:
        DeptError: what concerns more than one run: text that cannot be prepared, a cluster that is not there, a folder
            of another job. A run that fails by itself is a result.
    """
    cells, outcomes = known(study)
    for cell in cells:
        check_origin(cell.job)
        if retry and cell.name in outcomes and not outcomes[cell.name].finished:
            _error_file(cell.job).unlink(missing_ok=True)
            del outcomes[cell.name]
    while True:
        cells, outcomes = known(study, outcomes)
        write_tables(study, cells, outcomes)
        due = [cell.job for cell in cells if cell.name not in outcomes]
        if not due:
            return
        for job in due:
            if (where := in_progress(run_folder(job))) is not None:
                raise RunError(
                    f"run {job.name} is in progress ({in_words(where)}): wait for it, or stop it, then study again"
                )
        tell(f"{len(due)} runs to do")
        with closing(train(due)) as over:
            for job, error in over:
                outcomes[job.name] = outcome = _outcome(job, error)
                worth = f"{outcome.worth:.4f}" if math.isfinite(outcome.worth) else "–"  # diverged, or never measured
                told = f"{worth} bits/byte, {outcome.seconds:.0f} s of rounds"
                tell(f"{job.name}: {outcome.error or told}")
                write_tables(study, cells_of(study, outcomes), outcomes)


def _outcome(job: Job, error: str) -> Outcome:
    """What became of a run that is over; a failure is put where the next one who asks will find it.

    Raises:
        RunError: it is not over: somebody stopped it.
    """
    if error:
        _error_file(job).write_text(error)
    outcome = outcomes_of([job]).get(job.name)
    if outcome is None:
        raise RunError(f"run {job.name} was stopped before its last round: the same command goes on with it")
    return outcome


def _error_file(job: Job) -> Path:
    return run_folder(job) / "error.txt"


# ------------------------------------------------------------------------------------------------ where runs train
def here(jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
    """One after the other in this process, without Ray."""
    for job in jobs:
        error = ""
        try:
            train_here(job, lambda record: None)
        except (StoreError, WrongRunError):  # no word on the method
            raise
        except RunError as err:
            error = f"{type(err).__name__}: {err}"
        yield job, error


def on_ray(address: str | None = None, at_once: int = 1) -> Train:
    """On a cluster, some side by side.

    Args:
        address: of the cluster; None: RAY_ADDRESS, else a local Ray of this process.
        at_once: runs in progress, at most. Text is prepared before a run starts, by one at a time.
    """

    def train(jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
        waiting, live = list(reversed(jobs)), list[Run]()
        try:
            while waiting or live:
                while waiting and len(live) < at_once:
                    live.append(Run.start(waiting.pop(), address))
                for run in list(live):
                    if (status := run.status()).over:
                        run.kill()  # its processes make room for the next run's
                        live.remove(run)
                        yield run.job, status.error
                time.sleep(_LOOK_EVERY_S)
        finally:
            for run in live:
                run.kill()

    return train


# ------------------------------------------------------------------------------------------------ what comes of it
def folder_of(study: Study) -> Path:
    """Where its tables and pages are."""
    return Path(study.folder) / "studies" / study.name


def write_tables(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> Path:
    """The tables as far as runs are over (`known`): `table.md`, and all figures in `figures.json`.

    Raises:
        StoreError: they cannot be written.
    """
    folder, text = folder_of(study), markdown(study, cells, outcomes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "table.md", text.encode())
        write_atomically(folder / "figures.json", json.dumps(as_json(study, cells, outcomes), indent=1).encode())
    except OSError as err:
        raise StoreError(f"{folder} cannot be written ({err}): mend it, or set the study's `folder`") from err
    return folder / "table.md"


def write_pages(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[Path]:
    """The report of all bodies in the table side by side, and one of each adaptation, as far as runs are over.

    Raises:
        StoreError: one cannot be written.
    """
    pages = []
    for name in ("", *study.adaptations):
        runs = [run_folder(c.job) for c in cells if c.taken and c.adaptation == name and c.name in outcomes]
        runs = [run for run in runs if (run / "config.json").exists()]
        if runs:
            pages.append(write_report(runs, folder_of(study) / f"report{name and '-'}{name}.html"))
    return pages
