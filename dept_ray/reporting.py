"""The report: one page in a file, on a run or on several side by side. What is drawn is `study.report`'s to know."""

from collections.abc import Sequence
from pathlib import Path

from dept_ray.client import Run, stories_of
from dept_ray.errors import StoreError
from dept_ray.study.report import report_on
from dept_ray.text.shards import write_atomically


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """One HTML page on a run, or on several side by side.

    Args:
        runs: names under ./runs, or folders.
        out: the file to write; None: `report.html`, in the run's folder or, of several, in this one.

    Returns:
        Where it is.

    Raises:
        ConfigError: there is no such run.
        StoreError: the file cannot be written.
    """
    opened = [Run.open(run) for run in dict.fromkeys(map(str, runs))]
    file = Path(out) if out else Path("report.html") if len(opened) > 1 else opened[0].folder / "report.html"
    text = report_on(stories_of(opened))
    try:
        write_atomically(file, text.encode())
    except OSError as err:
        raise StoreError(f"{file} cannot be written ({err}): name another file with --out") from err
    return file
