"""A study from its first run to its last table, wherever its runs train.

Each run is an ordinary one (`client.Run`, or in this process). What is finished is left alone, what failed is a result,
and what was cut off goes on: the same call again does the rest.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dept_ray.client import Run, write_report
from dept_ray.config import Job
from dept_ray.errors import RunError, StoreError, WrongRunError
from dept_ray.in_process import train_here
from dept_ray.preparing import prepare
from dept_ray.rounds.folder import in_progress, run_folder
from dept_ray.study.cells import Cell, cells_of
from dept_ray.study.outcomes import Outcome, check_origin, outcomes_of
from dept_ray.study.study_file import Study
from dept_ray.study.study_table import as_json, markdown
from dept_ray.text.shards import write_atomically

Train = Callable[[Job], None]
"""Trains a job to its last round, and returns when it is over."""
Tell = Callable[[str], None]


def silent(words: str) -> None:
    """Tells nobody."""


def known(study: Study) -> tuple[list[Cell], dict[str, Outcome]]:
    """The cells that are known, and the outcomes of those that are over.

    Raises:
        ConfigError: the study does not describe jobs.
        WrongRunError, StoreError: a run's folder is another's, or cannot be read.
    """
    outcomes: dict[str, Outcome] = {}
    while True:
        cells = cells_of(study, outcomes)
        found = outcomes_of(cell.job for cell in cells)
        if found == outcomes:
            return cells, outcomes
        outcomes = found


def run_study(study: Study, train: Train, at_once: int = 1, retry: bool = False, tell: Tell = silent) -> None:
    """Run what is not over yet.

    Args:
        study: what to run.
        train: `here`, or `on_ray`.
        at_once: runs side by side.
        retry: run again what failed.
        tell: called with a line before and after each run.

    Raises:
        DeptError: what concerns more than one run: text that cannot be prepared, a cluster that is not there, a folder
            of another job. A run that fails by itself is a result.
    """
    cells, outcomes = known(study)
    for cell in cells:
        check_origin(cell.job)
        if retry and cell.name in outcomes and not outcomes[cell.name].finished:
            _error_file(cell).unlink(missing_ok=True)
    while True:
        cells, outcomes = known(study)
        due = [cell for cell in cells if cell.name not in outcomes]
        write_tables(study)
        if not due:
            return
        if at_once == 1:  # in this thread, where a debugger and Ctrl-C find it
            for cell in due:
                _run(cell, train, tell)
        else:
            with ThreadPoolExecutor(at_once) as threads:
                for done in [threads.submit(_run, cell, train, tell) for cell in due]:
                    done.result()


def _run(cell: Cell, train: Train, tell: Tell) -> None:
    if (where := in_progress(run_folder(cell.job))) is not None:
        raise RunError(f"run {cell.name} is in progress ({where}): wait for it, or stop it, then study again")
    tell(f"{cell.name}: begins")
    try:
        train(cell.job)
    except (StoreError, WrongRunError):
        raise
    except RunError as err:
        _error_file(cell).write_text(f"{type(err).__name__}: {err}")
    outcome = outcomes_of([cell.job]).get(cell.name)
    if outcome is None:
        raise RunError(f"run {cell.name} was stopped before its last round: the same command goes on with it")
    tell(f"{cell.name}: {outcome.error or f'{outcome.worth:.4f} bits/byte, {outcome.seconds:.0f} s of rounds'}")


def _error_file(cell: Cell) -> Path:
    return run_folder(cell.job) / "error.txt"


# ------------------------------------------------------------------------------------------------ where runs train
def here(job: Job) -> None:
    """In this process, without Ray."""
    train_here(job, lambda record: None)


def on_ray(address: str | None = None) -> Train:
    """On a cluster; None: RAY_ADDRESS, else a local Ray of this process."""
    from rich.console import Console

    def train(job: Job) -> None:
        Run.start(job, address).follow(Console(quiet=True))

    return train


def prepare_all(study: Study, address: str | None, local: bool) -> None:
    """The text of all bodies, one after the other: runs side by side would prepare the same at once.

    Raises:
        DataError: it cannot be prepared.
    """
    for cell in known(study)[0]:
        if not cell.adaptation:
            prepare(cell.job, address, local=local)


# ------------------------------------------------------------------------------------------------ what comes of it
def folder_of(study: Study) -> Path:
    """Where its tables and pages are."""
    return Path(study.folder) / "studies" / study.name


def write_tables(study: Study) -> Path:
    """The tables as far as runs are over: `table.md`, and all figures in `figures.json`.

    Raises:
        StoreError: they cannot be written.
    """
    cells, outcomes = known(study)
    folder, text = folder_of(study), markdown(study, cells, outcomes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "table.md", text.encode())
        write_atomically(folder / "figures.json", json.dumps(as_json(study, cells, outcomes), indent=1).encode())
    except OSError as err:
        raise StoreError(f"{folder} cannot be written ({err}): mend it, or set the study's `folder`") from err
    return folder / "table.md"


def write_pages(study: Study) -> list[Path]:
    """The report of all bodies in the table side by side, and one of each adaptation.

    Raises:
        StoreError: one cannot be written.
    """
    cells, outcomes = known(study)
    pages = []
    for name in ("", *study.adaptations):
        runs = [run_folder(c.job) for c in cells if c.taken and c.adaptation == name and c.name in outcomes]
        runs = [run for run in runs if (run / "config.json").exists()]
        if runs:
            pages.append(write_report(runs, folder_of(study) / f"report{name and '-'}{name}.html"))
    return pages
