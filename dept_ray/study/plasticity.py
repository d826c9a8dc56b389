"""How fast a run learns: the curve of its validation over steps, the area below it, and steps to reach a value.

Pure functions over records (schema: `rounds.ledger`). A run adapted to one unseen source says how plastic its body is
(METHOD.md section 4): the smaller the area, and the fewer steps to another run's last value, the more.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table

from dept_ray.console import figure_table
from dept_ray.metrics import Record
from dept_ray.study.story import measured

Curve = list[tuple[int, float]]
"""(global inner step, bits per byte), by step."""


def curve(records: Sequence[Record], source: str) -> Curve:
    """Validation of one source over the inner steps of a run; where it was measured twice, the last time counts."""
    steps = {record["round"]: record["step"] for record in records if record["event"] == "round"} | {0: 0}
    points = {
        steps[measured(record)]: record["scores"][source]["bits_per_byte"]
        for record in records
        if source in record.get("scores", {}) and measured(record) in steps
    }
    return sorted((step, bits) for step, bits in points.items() if bits is not None)


def area(points: Curve) -> float:
    """Below a curve, by trapezoids: bits per byte times steps; nan where nothing was measured.

    >>> area([(0, 4.0), (10, 2.0), (30, 1.0)])
    60.0
    """
    return sum((b - a) * (y + z) / 2 for (a, y), (b, z) in pairwise(points)) if points else math.nan


def steps_to(points: Curve, value: float) -> float | None:
    """The first step at which a curve is at `value` or below, straight lines between its points; None: it never is.

    >>> steps_to([(0, 4.0), (10, 2.0), (30, 1.0)], 1.5)
    20.0
    >>> steps_to([(0, 4.0), (10, 2.0)], 1.5)
    """
    if points and points[0][1] <= value:
        return float(points[0][0])
    for (a, y), (b, z) in pairwise(points):
        if z <= value:
            return a + (b - a) * (y - value) / (y - z)
    return None


def plasticity_table(
    records: Sequence[Record], title: str, baseline: Sequence[Record] = (), against: str = ""
) -> Table:
    """A line per source: first and last value, area over its steps (so: the mean height of the curve), and, beside a
    baseline, its own and the step at which its last value was reached.

    Args:
        records: of the run.
        title: of the table.
        baseline: records of the run to hold it against, if any.
        against: its name.
    """
    beside = (f"{against}\nlast", f"{against}\narea / steps", "steps\nto that") if baseline else ()
    table = figure_table(title, "bits/byte", "first", "last", "area / steps", "steps", *beside)
    sources = {source: score for record in records for source, score in record.get("scores", {}).items()}
    for source, score in sorted(sources.items()):
        points, theirs = curve(records, source), curve(baseline, source)
        row = [f"{source} (held out)" if score.get("held_out") else source]
        row += (
            [f"{points[0][1]:.4f}", f"{points[-1][1]:.4f}", _height(points), f"{points[-1][0]}"] if points else [""] * 4
        )
        if baseline:
            reached = steps_to(points, theirs[-1][1]) if theirs else None
            row += [f"{theirs[-1][1]:.4f}" if theirs else "", _height(theirs)]
            row += ["" if not theirs else "never" if reached is None else f"{reached:.0f}"]
        table.add_row(*row)
    return table


def _height(points: Curve) -> str:
    steps = points[-1][0] - points[0][0] if points else 0
    return f"{area(points) / steps:.4f}" if steps else ""
