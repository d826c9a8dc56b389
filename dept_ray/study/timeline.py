"""Who did what when: the rounds of a run as cells of a silo's row, and their drawing.

Records tell how long a silo did what, not when: a round's answers are taken to end together with it, each silo's last
wait being for the round's last answer. The time between rounds (pauses, a coordinator that was away) is not drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dept_ray.console import duration
from dept_ray.metrics import Record
from dept_ray.study.axes import Axis, axis_over
from dept_ray.study.charts import drawing, escaped, px, shortened, ticked, written

STATES = {
    "send": "sending", "load": "loading, saving", "score": "scoring", "train": "training", "wait": "waiting",
    "refused": "lost or refused", "away": "away",
}  # fmt: skip
"""What a silo may be at, by the record's key: its name in the legend."""
MOST_COLUMNS = 60
"""Rounds past so many share columns."""
WIDTH, _ROW, _LEFT, _TOP = 1150, 20, 124, 62
_NAME = 16
"""Letters of a silo's name that fit beside its row."""


@dataclass(frozen=True)
class Cell:
    """What one silo did in one column, in order."""

    silo: str
    start: float
    """Seconds of rounds since the first."""
    parts: tuple[tuple[str, float], ...]
    """(state, seconds)."""
    tip: str


@dataclass(frozen=True)
class Timeline:
    """The cells of a run, and where its columns begin."""

    silos: tuple[str, ...]
    columns: tuple[tuple[str, float], ...]
    """(round or rounds, start in seconds)."""
    end: float
    cells: tuple[Cell, ...]
    rounds_each: int
    """Rounds that share a column."""


def timeline_of(records: Sequence[Record], most: int = MOST_COLUMNS) -> Timeline:
    """Where every silo was in every round; past `most` rounds, so many together that they fit."""
    rounds = [record for record in records if record["event"] == "round"]
    each = max(1, math.ceil(len(rounds) / most))
    named: dict[str, None] = {}
    columns, cells, start = [], list[Cell](), 0.0
    for first in range(0, len(rounds), each):
        group = rounds[first : first + each]
        numbers = [record["round"] for record in group]
        name = str(numbers[0]) if len(group) == 1 else f"{numbers[0]}-{numbers[-1]}"
        columns.append((name, start))
        length = sum(record["seconds"] for record in group)
        for silo in sorted({silo for record in group for silo in _everyone(record)}):
            named[silo] = None
            cells += _cells(silo, group, name, start, length)
        start += length
    return Timeline(tuple(sorted(named)), tuple(columns), start, tuple(cells), each)


def _everyone(record: Record) -> set[str]:
    failed = {silo for attempt in record.get("failed", []) for silo in attempt["refused"]}
    return {*record["silos"], *record["refused"], *record.get("away", {}), *failed}


def _cells(silo: str, group: Sequence[Record], name: str, start: float, length: float) -> list[Cell]:
    """What a silo did in some rounds: one cell, and one before it for attempts that came to nothing."""
    seconds: dict[str, float] = {}
    refused, failed, away = list[str](), list[str](), list[str]()
    for record in group:
        said = f"round {record['round']}: "
        for what, s in record["silos"].get(silo, {}).get("seconds", {}).items():
            state = what if what in STATES else "load"
            if s and what != "ahead":  # that was while the round before was sent and waited for, which is drawn
                seconds[state] = seconds.get(state, 0.0) + s
        if silo in record["refused"]:
            refused.append(said + record["refused"][silo])
        failed += [
            f"{said}attempt {attempt['attempt'] + 1}: {attempt['refused'][silo]}"
            for attempt in record.get("failed", []) if silo in attempt["refused"]
        ]  # fmt: skip
        if record.get("away", {}).get(silo):
            away.append(said + record["away"][silo])
    cells = []
    total = sum(seconds.values())
    if total:
        shrunk = min(1.0, length / total)
        send = seconds.get("send", 0.0) / 2 * shrunk  # there and back
        order = [(state, seconds.get(state, 0.0) * shrunk) for state in ("load", "score", "train")]
        parts = [("send", send), *order, ("send", send), ("wait", seconds.get("wait", 0.0) * shrunk)]
        told = ", ".join(f"{STATES[state]} {s:.3g} s" for state, s in seconds.items())
        at = start + max(0.0, length - total)
        cells.append(Cell(silo, at, tuple((s, v) for s, v in parts if v > 0), f"{silo}, round {name}: {told}"))
    if away and not total:
        cells.append(Cell(silo, start, (("away", length),), f"{silo} away. " + "; ".join(away)))
    if refused or failed:
        free = length if refused and not total else max(0.0, length - total)
        cells.append(Cell(silo, start, (("refused", free),), f"{silo}. " + "; ".join(failed + refused)))
    return cells


def timeline_chart(title: str, timeline: Timeline, end: float | None = None) -> str:
    """One row a silo, time from left to right; `end` (seconds) makes several runs comparable."""
    height = _TOP + _ROW * max(1, len(timeline.silos)) + 44
    if not timeline.cells:
        return drawing(
            title, WIDTH, 90, "", [written(WIDTH / 2, 50, "no round is committed yet", "dept-label", "middle")]
        )
    last = max(end or 0.0, timeline.end)
    time = axis_over(
        f"time in rounds, {clock(last) if last >= 120 else 's'}", [0, last], zero=True, snug=True, unit="s"
    )
    right, bottom = WIDTH - 14, _TOP + _ROW * len(timeline.silos)

    def at(seconds: float) -> float:
        return _LEFT + (right - _LEFT) * time.share(seconds)

    parts = _columns(timeline, at, bottom)
    for number, silo in enumerate(timeline.silos):
        name = escaped(shortened(silo, _NAME)) + (f"<title>{escaped(silo)}</title>" if len(silo) > _NAME else "")
        cells = "".join(_drawn(cell, at) for cell in timeline.cells if cell.silo == silo)
        parts.append(
            f'<g transform="translate(0 {_TOP + _ROW * number})">'
            f'<text class="name" x="{_LEFT - 8}" y="14" text-anchor="end">{name}</text>{cells}</g>'
        )
    return drawing(title, WIDTH, height, _legend(timeline) + _time(time, at, bottom, height), parts)


def _drawn(cell: Cell, at: Callable[[float], float]) -> str:
    """A cell in its silo's row."""
    boxes, begin = "", cell.start
    for state, seconds in cell.parts:
        left, wide = at(begin), at(begin + seconds) - at(begin)
        begin += seconds
        if state == "refused":
            wide = max(wide, 5.0)  # to be seen however short the round was
        if wide >= 0.25:
            boxes += f'<path class="dept-{state}" d="M{px(left)} 10h{px(wide)}"/>'
    return f"<g>{boxes}<title>{escaped(cell.tip)}</title></g>"


def _legend(timeline: Timeline) -> str:
    there = {state for cell in timeline.cells for state, _ in cell.parts}
    parts, left = "", float(_LEFT)
    for state, words in STATES.items():
        if state in there:
            parts += f'<path class="dept-{state}" d="M{px(left)} 30h12"/>'
            parts += written(left + 17, 34, words, "name")
            left += 34 + 7 * len(words)
    return parts


def _columns(timeline: Timeline, at: Callable[[float], float], bottom: float) -> list[str]:
    """A line where each round begins, and its number where there is room."""
    names, lines, free = list[str](), "", 0.0
    for name, start in timeline.columns:
        x = at(start)
        lines += f"M{px(x)} {_TOP - 4}V{bottom}"
        if x >= free and x + 7 * len(name) < WIDTH:
            names.append(written(x + 2, 54, name))
            free = x + 7 * len(name) + 9
    what = written(_LEFT - 8, 54, "round" if timeline.rounds_each == 1 else "rounds", "dept-tick", "end")
    return [what, f'<path class="dept-grid" d="{lines}"/>', ticked(names, "start")]


def _time(time: Axis, at: Callable[[float], float], bottom: float, height: float) -> str:
    ticks = time.ticks()
    marks = "".join(f"M{px(at(tick))} {bottom}v4" for tick in ticks)
    return "".join([
        f'<path class="dept-axis" d="M{_LEFT} {bottom}H{WIDTH - 14}{marks}"/>',
        ticked(written(at(tick), bottom + 17, time.told(tick)) for tick in ticks),
        written((_LEFT + WIDTH - 14) / 2, height - 6, time.label, "dept-label", "middle"),
    ])  # fmt: skip


def clock(seconds: float) -> str:
    """What `console.duration` tells such a time in."""
    return "min:s" if seconds < 3599.5 else "h:min:s" if seconds < 48 * 3600 else "days and hours"


def spoken(timeline: Timeline) -> str:
    """What a reader must know of the drawing."""
    shared = f" Each column is {timeline.rounds_each} rounds." if timeline.rounds_each > 1 else ""
    return (
        f"{duration(timeline.end)} of rounds in all ({clock(timeline.end)}); pauses between them are left out.{shared}"
    )
