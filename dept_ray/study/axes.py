"""An axis: from where to where, where its ticks are, and how they are told. Pure arithmetic; `charts` draws.

Charts that are to be compared share an `Axis`, made over the values of all of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dept_ray.console import duration, human

_TICKS, _SNUG_TICKS = 5, 9
"""At most about so many: on an axis, and on one that ends where its values end (which is a long one)."""
_TIME_STEPS_S = (60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    low: float
    high: float
    step: float
    """Between ticks; of a logarithmic axis, in decades."""
    log: bool = False
    unit: str = ""
    """B: bytes. s: time. Otherwise the label names it."""

    def share(self, value: float) -> float:
        """Where a value is: 0 at the low end, 1 at the high one; what lies outside is at an end.

        >>> Axis("", 0, 8, 2).share(2), Axis("", 1, 100, 1, log=True).share(10)
        (0.25, 0.5)
        """
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Multiples of the step, from end to end.

        >>> Axis("", 0.9, 2.0, 0.5).ticks(), Axis("", 10, 1000, 1, log=True).ticks()
        ([1.0, 1.5, 2.0], [10.0, 100.0, 1000.0])
        """
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        first, last = math.ceil(low / self.step - 1e-9), math.floor(high / self.step + 1e-9)
        at = [number * self.step for number in range(first, last + 1)]
        return [10.0**power for power in at] if self.log else [float(f"{value:.12g}") for value in at]

    def told(self, value: float) -> str:
        """A tick's value in words.

        >>> Axis("", 0, 1, 0.25).told(0.5), Axis("", 0, 1e7, 2e6, unit="B").told(2e6), Axis("", 0, 9, 1).told(3.0)
        ('0.50', '2.00 MB', '3')
        """
        if self.unit == "s":
            return duration(value) if self.high >= 120 else f"{value:g}"
        if self.unit:
            return human(value, self.unit) if value else "0"
        if self.log:
            return f"{value:g}"
        step = f"{self.step:.12f}".rstrip("0")
        return f"{value:,.{len(step.partition('.')[2])}f}"


def axis_over(
    label: str, values: Iterable[float], *, zero: bool = False, whole: bool = False, log: bool = False,
    snug: bool = False, unit: str = "",
) -> Axis:  # fmt: skip
    """An axis that holds all values; those that are not finite (and on a logarithmic one, not positive) are ignored.

    Args:
        label: what it shows, with its unit.
        values: of everything that shares the axis; may be none.
        zero: begin at 0.
        whole: ticks at whole numbers only.
        log: logarithmic, from a power of ten to a power of ten.
        snug: end where the values end, not at the next tick.
        unit: see `Axis.unit`.
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log:
        low = math.floor(math.log10(min(known, default=1.0)) + 1e-9)
        high = max(math.ceil(math.log10(max(known, default=10.0)) - 1e-9), low + 1)
        return Axis(label, 10.0**low, 10.0**high, max(1, round((high - low) / _TICKS)), True, unit)
    low, high = min(known, default=0.0), max(known, default=1.0)
    low = min(0.0, low) if zero else low
    if low == high:
        pad = 1.0 if whole or not low else abs(low) / 10
        low, high = (low, high + pad) if whole or zero else (low - pad, high + pad)
    step = _step((high - low) / (_SNUG_TICKS if snug else _TICKS), whole, unit)
    if not snug:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(label, low, high, step, unit=unit)


def _step(about: float, whole: bool, unit: str) -> float:
    """The nearest distance above that people count in."""
    if unit == "s" and about > 30:
        return next((float(s) for s in _TIME_STEPS_S if s >= about), math.ceil(about / 86_400) * 86_400.0)
    power = 10.0 ** math.floor(math.log10(about))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= about * (1 - 1e-9))
    return max(1.0, step) if whole else step
