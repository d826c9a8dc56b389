"""Where records go: JSONL (the truth), TensorBoard (a view of it), and lines on a console.

A sink is a callable that takes a record, a plain dictionary (schema: `rounds.ledger`). `Log` gives one record to
several.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dept_ray.errors import StoreError

Record = dict[str, Any]
Sink = Callable[[Record], None]


class Log:
    """Gives each record to every sink, in order."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def __call__(self, record: Record) -> None:
        for sink in self.sinks:
            sink(record)


class JsonLines:
    """Appends one JSON object a line, flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, record: Record) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        except OSError as err:
            raise StoreError(f"{self.path} cannot be written ({err}); no round is lost: free space, run again") from err


def finite(value: Any) -> Any:
    """A record without what JSON cannot say: nan and infinities become None.

    >>> finite({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Writes every number of a record under its path, such as `silos/de/loss`, at the record's round.

    Norms, which are measured over inner steps, go to a folder of their own: `steps`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}

    def __call__(self, record: Record) -> None:
        if record["event"] == "change":
            return
        writer = self._writer("", record["round"])
        # Scores of a round's record were measured before its training: they belong to the round before.
        scored = record["round"] - (record["event"] == "round")
        for path, value in numbers(record):
            if path not in ("round", "attempt"):
                step = scored if path.startswith(("scores/", "mean/")) else record["round"]
                writer.add_scalar(path, value, step)
        writer.flush()
        for name, silo in record.get("silos", {}).items():
            if norms := silo.get("norms"):
                self._write_norms(name, norms)

    def close(self) -> None:
        """Let go of the files."""
        for writer in self._writers.values():
            writer.close()

    def _write_norms(self, silo: str, norms: Mapping[str, list[float]]) -> None:
        writer = self._writer("steps", int(norms["step"][0]))
        for what in norms.keys() - {"step"}:
            for step, value in zip(norms["step"], norms[what], strict=True):
                if value is not None and math.isfinite(value):
                    writer.add_scalar(f"norms/{silo}/{what}", value, int(step))
        writer.flush()

    def _writer(self, folder: str, first: int) -> Any:
        """Of a folder; what an earlier life left there at or after the first place seen is written again: hide it."""
        if folder not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[folder] = SummaryWriter(str(self.folder / folder), purge_step=first)
        return self._writers[folder]


def numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in a record, by path.

    >>> dict(numbers({"loss": 1.5, "silos": {"de": {"steps": 3, "name": "x"}}}))
    {'loss': 1.5, 'silos/de/steps': 3.0}
    """
    for key, value in record.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from numbers(value, path + "/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield path, float(value)


def read_records(path: Path) -> list[Record]:
    """The records of a run so far; a line still being written is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
