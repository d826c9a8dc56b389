"""The charts of one run, or of several on the same axes: stories in, SVG strings out, one a run."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from dept_ray.console import human
from dept_ray.study.axes import Axis, axis_over
from dept_ray.study.charts import Bar, Line, bar_chart, line_chart
from dept_ray.study.story import Points, Story
from dept_ray.study.timeline import timeline_chart, timeline_of

Curves = dict[str, Points]
MOST_BARS = 60
"""Rounds past so many share bars."""


def titled(title: str, story: Story, stories: Sequence[Story]) -> str:
    """A chart's title, with the run's name where there are several."""
    return f"{title}: {story.name}" if len(stories) > 1 else title


def colors_of(stories: Sequence[Story]) -> dict[str, int]:
    """A colour for each silo and source, the same in every chart of every run."""
    names = {name for story in stories for record in story.rounds for name in record["silos"]}
    names |= {source for story in stories for source in story.worth()}
    return {name: number for number, name in enumerate(sorted(names))}


def losses(stories: Sequence[Story]) -> list[str]:
    """Training loss of each silo."""
    return _per_round(
        stories, "Training loss", "nats per token, mean of the round", lambda story: story.of_silos("loss")
    )


def norms(stories: Sequence[Story]) -> list[str]:
    """How far each silo moved the body."""
    moved = _moved("norm")
    return _per_round(stories, "How far each silo moved the body", "L2 norm of its delta", moved, zero=True)


def cosines(stories: Sequence[Story]) -> list[str]:
    """How far the silos agree."""
    title, label = "How far each silo agrees with the mean", "cosine of its delta to the mean"
    return _per_round(stories, title, label, _moved("cosine"), zero=True)


def parameter_norms(stories: Sequence[Story]) -> list[str]:
    """How large each silo's body is."""
    return _per_round(stories, "Norm of the body", "L2 norm of all its parameters", _norms_of("body"), over="step")


def activation_norms(stories: Sequence[Story]) -> list[str]:
    """How large activations are in each silo."""
    label = "L2 norm after the block where it is largest"
    return _per_round(stories, "Norm of the activations", label, _norms_of("activation"), over="step")


def bits(stories: Sequence[Story]) -> list[str]:
    """Bits per byte of each source's held-out text, and their mean."""
    curves = [story.bits() for story in stories]
    x = _rounds_axis("rounds trained", curves)
    y = axis_over("bits per byte of held-out text", _values(curves))
    colors = colors_of(stories)
    charts = []
    for story, known in zip(stories, curves, strict=True):
        lines = [Line(name, tuple(points), colors[name]) for name, points in known.items()]
        if len(lines) > 1:
            lines.append(Line("mean", tuple(story.mean_bits())))
        charts.append(line_chart(titled("Bits per byte", story, stories), lines, x, y))
    return charts


def mean_bits(stories: Sequence[Story]) -> str:
    """The mean bits per byte of several runs in one chart."""
    curves: Curves = {story.name: story.mean_bits() for story in stories}
    x, y = _rounds_axis("rounds trained", [curves]), axis_over("mean bits per byte", _values([curves]))
    lines = [Line(name, tuple(points), number) for number, (name, points) in enumerate(curves.items())]
    return line_chart("Mean bits per byte of held-out text", lines, x, y)


def bytes_per_round(stories: Sequence[Story]) -> list[str]:
    """What each round sent, down and up; past `MOST_BARS` rounds, the mean of so many."""
    every = [_binned(story.sent()) for story in stories]
    y = axis_over(
        "bytes a round, all silos", [down + up for bars in every for _, down, up in bars], zero=True, unit="B"
    )
    charts = []
    for story, bars in zip(stories, every, strict=True):
        drawn = [
            Bar(name, (down, up), f"round {name}: {human(down, 'B')} down, {human(up, 'B')} up")
            for name, down, up in bars
        ]
        label = "round" if all("-" not in bar.name for bar in drawn) else "rounds, the mean of each bar's"
        charts.append(
            bar_chart(titled("Bytes sent", story, stories), drawn, ("down to silos", "up from silos"), label, y)
        )
    return charts


def bytes_so_far(stories: Sequence[Story]) -> list[str]:
    """All that was sent, beside what a gradient exchange at each step would have sent."""
    curves: list[Curves] = []
    for story in stories:
        sent = story.sent()
        so_far = itertools.accumulate(down + up for _, down, up in sent)
        numbers = (float(number) for number, *_ in sent)
        # A logarithmic axis has no place for nothing.
        mine = [(number, float(total) or math.nan) for number, total in zip(numbers, so_far, strict=True)]
        curves.append({"sent": mine, "data-parallel": story.data_parallel_bytes() or []})
    x = _rounds_axis("round", curves)
    y = axis_over("bytes so far, logarithmic", _values(curves), log=True, unit="B")
    return [
        line_chart(
            titled("All bytes, down and up", story, stories),
            [Line(name, tuple(points), number) for number, (name, points) in enumerate(known.items())], x, y,
        )
        for story, known in zip(stories, curves, strict=True)
    ]  # fmt: skip


def timelines(stories: Sequence[Story]) -> list[str]:
    """Who did what when, on one scale of time."""
    every = [timeline_of(story.records) for story in stories]
    end = max((timeline.end for timeline in every), default=0.0)
    return [
        timeline_chart(titled("What each silo did", story, stories), timeline, end)
        for story, timeline in zip(stories, every, strict=True)
    ]


def _moved(key: str) -> Callable[[Story], Curves]:
    """A figure of the body's delta; where bodies stay home there is none, though the record says 0."""
    return lambda story: story.of_silos(key) if any(down for _, down, _ in story.sent()) else {}


def _norms_of(what: str) -> Callable[[Story], Curves]:
    return lambda story: story.norms(what)


def _per_round(
    stories: Sequence[Story], title: str, label: str, curves_of: Callable[[Story], Curves], zero: bool = False,
    over: str = "round",
) -> list[str]:  # fmt: skip
    """A chart a run of one figure of its silos."""
    curves, colors = [curves_of(story) for story in stories], colors_of(stories)
    x, y = _rounds_axis(over, curves), axis_over(label, _values(curves), zero=zero)
    return [
        line_chart(
            titled(title, story, stories), [Line(k, tuple(p), colors[k]) for k, p in sorted(known.items())], x, y
        )
        for story, known in zip(stories, curves, strict=True)
    ]


def _rounds_axis(label: str, curves: Iterable[Curves]) -> Axis:
    return axis_over(
        label, [x for known in curves for points in known.values() for x, _ in points], whole=True, snug=True
    )


def _values(curves: Iterable[Curves]) -> list[float]:
    return [y for known in curves for points in known.values() for _, y in points]


def _binned(sent: Sequence[tuple[int, int, int]]) -> list[tuple[str, float, float]]:
    """(round or rounds, bytes down, bytes up), in at most `MOST_BARS` bars."""
    each = max(1, math.ceil(len(sent) / MOST_BARS))
    bars = []
    for first in range(0, len(sent), each):
        group = sent[first : first + each]
        name = str(group[0][0]) if len(group) == 1 else f"{group[0][0]}-{group[-1][0]}"
        bars.append((name, sum(down for _, down, _ in group) / len(group), sum(up for *_, up in group) / len(group)))
    return bars
