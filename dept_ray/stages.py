"""The stages of preparation as a person sees them: bars on a terminal, else a line for each that is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dept_ray.preparing import Report

_WORDS = {
    "clean": "reading and cleaning text",
    "learn": "learning tokenizers",
    "pack": "tokenising",
    "index": "indexing",
}


@contextmanager
def shown_on(console: Console) -> Iterator[Report]:
    """What to report stages to, while it lasts."""
    bars: dict[str, Any] = {}
    columns = TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:

        def report(stage: str, done: int, of: int) -> None:
            if not console.is_terminal:
                if done == of:
                    console.print(f"{_WORDS[stage]}: {of} of {of}", highlight=False)
                return
            if stage not in bars:
                bars[stage] = progress.add_task(_WORDS[stage], total=of)
            progress.update(bars[stage], completed=done)
            if done == of:
                progress.stop_task(bars[stage])

        yield report
