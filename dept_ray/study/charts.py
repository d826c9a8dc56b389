"""Charts as SVG: values in, a string out; small, readable in light and dark, and without a script.

Colours are classes (`c0` to `c7`, `mean`, and what `timeline` calls its states), which `page.STYLE` gives a meaning.
Nothing here knows what a run is. All text that is passed in is escaped here. A page holds many of them, so what many
points, ticks or names have in common is said once, of their group.
"""

import html
import itertools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dept_ray.study.axes import Axis

COLORS = 8
"""Distinct ones; past them lines are dashed, then dotted."""
WIDTH, HEIGHT, EMPTY_HEIGHT = 590, 270, 100
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 164, 30, 42
_LABEL_GAP = 14
_NAME = 13
"""Letters of a name that fit beside a line."""
_MANY = 80
"""Points of a line past which only its ends, and points that stand alone, are marked; also the most tips of a chart."""


@dataclass(frozen=True)
class Line:
    """One line of a chart; a y that is not finite breaks it."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int | None = None
    """An index; None: the mean of others."""


@dataclass(frozen=True)
class Bar:
    """One stacked bar."""

    name: str
    values: tuple[float, ...]
    """From the bottom up."""
    tip: str


def escaped(text: str) -> str:
    """Text for HTML and XML, in elements and quoted attributes; a control character, which XML has not, as U+FFFD.

    >>> escaped('<a href="x">'), escaped("a\\x1bb")
    ('&lt;a href=&quot;x&quot;&gt;', 'a\ufffdb')
    """
    bad = ("Cc", "Cs", "Cn")
    return html.escape("".join("\ufffd" if unicodedata.category(c) in bad and c not in "\n\t" else c for c in text))


def shortened(name: str, letters: int = _NAME) -> str:
    """A name that fits."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def px(value: float) -> str:
    """A length or a place in a drawing, to a tenth.

    >>> px(12.04), px(12.06)
    ('12', '12.1')
    """
    return f"{value:.1f}".removesuffix(".0")


def written(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    """One line of text; what is left out is as its group says."""
    how = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{px(x)}" y="{px(y)}"{how}>{escaped(text)}</text>'


def ticked(texts: Iterable[str], anchor: str = "middle") -> str:
    """Texts of ticks, which are written alike."""
    return f'<g class="dept-tick" text-anchor="{anchor}">{"".join(texts)}</g>'


FRAME, MARKS = '<g class="frame">', '<g class="marks">'
"""What a drawing's two parts begin with."""


def drawing(title: str, width: float, height: float, frame: str, marks: Sequence[str]) -> str:
    """The svg element around a frame and what is drawn in it, with its title on top.

    It may shrink to half its width where there is no room, and grows no wider than it was drawn.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escaped(title)}" style="--wide:{width:g}px">'
        f"{written(0, 15, title, 'title')}{FRAME}{frame}</g>{MARKS}{''.join(marks)}</g></svg>"
    )  # fmt: skip


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines over a common x, each with its name and last value beside its end."""
    shown = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
    height = max(HEIGHT, _TOP + _BOTTOM + _LABEL_GAP * len(shown))
    if not shown:
        return _empty(title)
    frame = _Frame(x, y, height)
    ends = [next(point for point in reversed(line.points) if math.isfinite(point[1])) for line in shown]
    heights = spread([frame.y(value) for _, value in ends], _LABEL_GAP, frame.top, frame.bottom)
    parts, right = [_tips(shown, frame)], frame.right + 12
    for line, (end, value), at in zip(shown, ends, heights, strict=True):
        label = f"{shortened(line.name)} {_told(value, y)}"
        whole = f"<title>{escaped(line.name)}</title>" if shortened(line.name) != line.name else ""
        parts.append(
            f'<g class="{_color(line.color)}">{_path(line, frame)}'
            f'<path class="leader" d="M{px(frame.x(end) + 4)} {px(frame.y(value))}L{right - 3} {px(at)}"/>'
            f'<text class="name" x="{right}" y="{px(at + 4)}">{escaped(label)}{whole}</text></g>'
        )
    return drawing(title, WIDTH, height, frame.grid(), parts)


def bar_chart(title: str, bars: Sequence[Bar], kinds: Sequence[str], x_label: str, y: Axis) -> str:
    """Stacked bars, such as one a round; `kinds` names what they are stacked of, from the bottom up."""
    if not any(sum(bar.values) > 0 for bar in bars):
        return _empty(title, "nothing was sent" if bars else "no round is committed yet")
    frame = _Frame(Axis(x_label, 0, len(bars), 1), y, HEIGHT, x_ticks=False)
    parts, names = list[str](), list[str]()
    wide = (frame.right - frame.left) / len(bars)
    label = max(7 * len(bar.name) for bar in bars) + 10
    every = math.ceil(label / wide)
    for number, bar in enumerate(bars):
        left, bottom, boxes = frame.left + number * wide, 0.0, ""
        for kind, value in enumerate(bar.values):
            top = frame.y(bottom + value)
            boxes += (
                f'<rect class="fill c{kind}" x="{px(left + wide * 0.1)}" y="{px(top)}" width="{px(wide * 0.8)}" '
                f'height="{px(frame.y(bottom) - top)}"/>'
            )
            bottom += value
        parts.append(f"<g>{boxes}<title>{escaped(bar.tip)}</title></g>")
        if number % every == 0:
            names.append(written(left + wide / 2, frame.bottom + 15, bar.name))
    parts.append(ticked(names))
    for kind, name in enumerate(kinds):
        at = frame.top + 12 + (len(kinds) - 1 - kind) * 18
        parts.append(f'<rect class="fill c{kind}" x="{frame.right + 12}" y="{at - 9}" width="11" height="11"/>')
        parts.append(written(frame.right + 28, at, name, "name"))
    return drawing(title, WIDTH, HEIGHT, frame.grid(), parts)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights moved as little as they must be to stand a gap apart, in their order, between two bounds if they fit.

    >>> spread([10, 12, 50], 10, 0, 100), spread([98, 99], 10, 0, 100)
    ([10, 20, 50], [90, 100])
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    below = low - gap
    for i in order:
        placed[i] = below = max(heights[i], below + gap)
    above = high + gap
    for i in reversed(order):
        placed[i] = above = min(placed[i], above - gap)
    return placed


class _Frame:
    """The plot's box in a drawing, and its axes."""

    def __init__(self, x: Axis, y: Axis, height: float, x_ticks: bool = True) -> None:
        self.x_axis, self.y_axis, self.height, self.x_ticks = x, y, height, x_ticks
        self.left, self.right, self.top, self.bottom = _LEFT, WIDTH - _RIGHT, _TOP, height - _BOTTOM

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x_axis.share(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y_axis.share(value)

    def grid(self) -> str:
        """Axes, ticks, and their labels."""
        y_ticks, x_ticks = self.y_axis.ticks(), self.x_axis.ticks() if self.x_ticks else []
        lines = "".join(f"M{self.left} {px(self.y(tick))}H{self.right}" for tick in y_ticks)
        turn = (self.top + self.bottom) / 2
        label = written(10, turn, self.y_axis.label, "dept-label", "middle")
        return "".join([
            f'<path class="dept-grid" d="{lines}"/>',
            f'<path class="dept-axis" d="M{self.left} {self.bottom}H{self.right}"/>',
            ticked((written(self.left - 6, self.y(tick) + 4, self.y_axis.told(tick)) for tick in y_ticks), "end"),
            ticked(written(self.x(tick), self.bottom + 15, self.x_axis.told(tick)) for tick in x_ticks),
            written((self.left + self.right) / 2, self.height - 8, self.x_axis.label, "dept-label", "middle"),
            f'<g transform="rotate(-90 10 {px(turn)})">{label}</g>',
        ])  # fmt: skip


def _tips(lines: Sequence[Line], frame: _Frame) -> str:
    """What all lines are at each x, in a band around it that shows under the pointer; of many x, at some."""
    values = [dict(line.points) for line in lines]
    every = sorted({x for known in values for x, y in known.items() if math.isfinite(y)})
    shown = every[:: -math.ceil(len(every) / _MANY)][::-1]
    middles = [(frame.x(a) + frame.x(b)) / 2 for a, b in itertools.pairwise(shown)]
    edges = itertools.pairwise([frame.left, *middles, frame.right])
    bands = []
    for x, (left, right) in zip(shown, edges, strict=True):
        there = [(line.name, known[x]) for line, known in zip(lines, values, strict=True) if x in known]
        told = [f"{name}: {_told(y, frame.y_axis)}" for name, y in there if math.isfinite(y)]
        band = f"M{px(left)} {frame.top}H{px(right)}V{px(frame.bottom)}H{px(left)}"
        tip = escaped("\n".join([f"{frame.x_axis.label} {x:g}", *told]))
        bands.append(f'<path d="{band}"><title>{tip}</title></path>')
    return f'<g class="tips">{"".join(bands)}</g>'


def _path(line: Line, frame: _Frame) -> str:
    """The line, in as many pieces as it has, with a dot at each point."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in line.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    parts, dots, many = [], "", len(line.points) > _MANY
    for piece in pieces:
        at = [f"{px(frame.x(x))} {px(frame.y(y))}" for x, y in piece]
        if len(at) > 1:
            parts.append(f'<path class="line" d="M{"L".join(at)}"/>')
        marked = at if not many or len(at) == 1 else at[-1:]
        dots += "".join(f"M{dot}h0" for dot in marked)
    return "".join(parts) + f'<path class="dots" d="{dots}"/>'


def _told(value: float, axis: Axis) -> str:
    return axis.told(value) if axis.unit else f"{value:.4g}"


def _color(index: int | None) -> str:
    if index is None:
        return "mean"
    dashed = min(index // COLORS, 2)
    return f"c{index % COLORS}" + (f" dash{dashed}" if dashed else "")


def _empty(title: str, words: str = "nothing to show yet") -> str:
    return drawing(title, WIDTH, EMPTY_HEIGHT, "", [written(_LEFT, EMPTY_HEIGHT / 2, words, "dept-label")])
