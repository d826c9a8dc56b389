"""Charts as SVG: values in, a string out; small, readable in light and dark, and without a script.

Colours are classes (`c0` to `c7`, `mean`, and what `timeline` calls its states), which `page.STYLE` gives a meaning.
Nothing here knows what a run is. All text that is passed in is escaped here.
"""

import html
import math
import unicodedata
from collections.abc import Sequence
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
"""Points of a line past which only its ends, and points that stand alone, are marked."""


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


def written(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escaped(text)}</text>'


def drawing(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """The svg element around a drawing's parts, with its title on top.

    It may shrink to half its width where there is no room, and grows no wider than it was drawn.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escaped(title)}" style="width:100%;max-width:{width:g}px;min-width:{width / 2:g}px">'
        + written(0, 15, title, "title") + "".join(parts) + "</svg>"
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
    parts = [frame.grid()]
    for line in shown:
        parts.append(_path(line, frame))
    for line, (end, value), at in zip(shown, ends, heights, strict=True):
        right = frame.right + 12
        label = f"{shortened(line.name)} {_told(value, y, 4)}"
        parts.append(
            f'<path class="leader" d="M{frame.x(end) + 4:.1f} {frame.y(value):.1f}L{right - 3} {at:.1f}"/>'
            f'<g class="{_color(line.color)}"><text class="name" x="{right}" y="{at + 4:.1f}">{escaped(label)}'
            f"<title>{escaped(f'{line.name}: {_told(value, y, 6)} at {x.label} {end:g}')}</title></text></g>"
        )
    return drawing(title, WIDTH, height, parts)


def bar_chart(title: str, bars: Sequence[Bar], kinds: Sequence[str], x_label: str, y: Axis) -> str:
    """Stacked bars, such as one a round; `kinds` names what they are stacked of, from the bottom up."""
    if not any(sum(bar.values) > 0 for bar in bars):
        return _empty(title, "nothing was sent" if bars else "no round is committed yet")
    frame = _Frame(Axis(x_label, 0, len(bars), 1), y, HEIGHT, x_ticks=False)
    parts = [frame.grid()]
    wide = (frame.right - frame.left) / len(bars)
    label = max(7 * len(bar.name) for bar in bars) + 10
    every = math.ceil(label / wide)
    for number, bar in enumerate(bars):
        left, bottom, boxes = frame.left + number * wide, 0.0, ""
        for kind, value in enumerate(bar.values):
            top = frame.y(bottom + value)
            boxes += (
                f'<rect class="fill c{kind}" x="{left + wide * 0.1:.1f}" y="{top:.1f}" width="{wide * 0.8:.1f}" '
                f'height="{frame.y(bottom) - top:.1f}"/>'
            )
            bottom += value
        parts.append(f"<g>{boxes}<title>{escaped(bar.tip)}</title></g>")
        if number % every == 0:
            parts.append(written(left + wide / 2, frame.bottom + 15, bar.name, "tick", "middle"))
    for kind, name in enumerate(kinds):
        at = frame.top + 12 + (len(kinds) - 1 - kind) * 18
        parts.append(f'<rect class="fill c{kind}" x="{frame.right + 12}" y="{at - 9}" width="11" height="11"/>')
        parts.append(written(frame.right + 28, at, name, "name"))
    return drawing(title, WIDTH, HEIGHT, parts)


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
        parts = []
        for tick in self.y_axis.ticks():
            at = self.y(tick)
            parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.right}"/>')
            parts.append(written(self.left - 6, at + 4, self.y_axis.told(tick), "tick", "end"))
        if self.x_ticks:
            for tick in self.x_axis.ticks():
                parts.append(written(self.x(tick), self.bottom + 15, self.x_axis.told(tick), "tick", "middle"))
        parts.append(f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>')
        parts.append(written((self.left + self.right) / 2, self.height - 8, self.x_axis.label, "label", "middle"))
        turn = (self.top + self.bottom) / 2
        label = written(10, turn, self.y_axis.label, "label", "middle")
        parts.append(f'<g transform="rotate(-90 10 {turn:.1f})">{label}</g>')
        return "".join(parts)


def _path(line: Line, frame: _Frame) -> str:
    """The line, in as many pieces as it has, with a dot at each point."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in line.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    parts, many = [], len(line.points) > _MANY
    for piece in pieces:
        at = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in piece]
        if len(at) > 1:
            parts.append(f'<path class="line" d="M{"L".join(at)}"/>')
        dots = piece if not many or len(piece) == 1 else piece[-1:]
        for x, y in dots:
            tip = escaped(f"{line.name}: {_told(y, frame.y_axis, 6)} at {frame.x_axis.label} {x:g}")
            parts.append(
                f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"><title>{tip}</title></circle>'
            )
    return f'<g class="{_color(line.color)}">{"".join(parts)}</g>'


def _told(value: float, axis: Axis, digits: int) -> str:
    return axis.told(value) if axis.unit else f"{value:.{digits}g}"


def _color(index: int | None) -> str:
    if index is None:
        return "mean"
    return f"c{index % COLORS} dash{min(index // COLORS, 2)}"


def _empty(title: str, words: str = "nothing to show yet") -> str:
    return drawing(title, WIDTH, EMPTY_HEIGHT, [written(_LEFT, EMPTY_HEIGHT / 2, words, "label")])
