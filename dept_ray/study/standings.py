"""How the variants of a study stand: mean and spread over seeds, against the best baseline, and how often they win.

Pure functions over cells and outcomes. AVG is the arithmetic mean over sources (METHOD.md section 4); where a run has
several bodies, each is adapted by itself and their mean is taken. Less is better, of every figure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from dept_ray.study.cells import Cell
from dept_ray.study.outcomes import Outcome
from dept_ray.study.study_file import Point, Study

FIGURES = {
    "bits_per_byte": ("bits_per_byte", False),
    "bits_per_byte_held_out": ("bits_per_byte", True),
    "perplexity": ("perplexity", False),
    "perplexity_held_out": ("perplexity", True),
}
"""By name: a score's key, and whether it is of held-out sources."""


@dataclass(frozen=True)
class Spread:
    """One figure over seeds."""

    mean: float
    deviation: float | None
    """Of the sample; None: of one seed."""
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value at least.

        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, deviation=1.4142135623730951, seeds=2)
        """
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Standing:
    """One row of a table."""

    row: str
    variant: str
    point: Point
    baseline: bool
    tried: Point
    """The value of its sweep that was taken."""
    tokens: int
    sent_bytes: int
    """Of a run, both ways."""
    runs: int
    """Runs that are over; of several bodies each has its own."""
    figures: dict[str, Spread]
    diverged: int = 0
    """Runs that failed, or know less than their unigram model."""
    errors: tuple[str, ...] = ()
    activation: float | None = None
    over_best: dict[str, float] = field(default_factory=dict)
    """Percent by which a figure is less than the best baseline's: of those measured on the same text and, if it is a
    perplexity, on the same tokens."""
    wins: tuple[int, int] | None = None
    """Of all sources and seeds, how often its bits per byte are less than the best baseline's; and of how many."""


def standings(
    study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], adaptation: str = ""
) -> list[Standing]:  # fmt: skip
    """Of each row, as far as its runs are over.

    Args:
        study: whose.
        cells: of the study.
        outcomes: of those that are over, by name.
        adaptation: its name; empty: how bodies stand as they were trained.
    """
    taken = [c for c in cells if c.taken and c.adaptation == adaptation and c.name in outcomes]
    by_row: dict[str, list[Cell]] = {}
    for cell in taken:
        by_row.setdefault(cell.row, []).append(cell)
    found = [_standing(study, mine, outcomes) for mine in by_row.values()]
    bits = {row: _by_source(mine, outcomes) for row, mine in by_row.items()}
    unigram = {row: _by_source(mine, outcomes, "unigram_bits_per_byte") for row, mine in by_row.items()}
    held = []
    for one in found:
        rivals = [b for b in found if b.baseline and _sources(bits[b.row]) == _sources(bits[one.row])]
        best: dict[str, Standing] = {}
        for name, (key, _) in FIGURES.items():
            known = [b for b in rivals if name in b.figures]
            if key == "perplexity":
                known = [b for b in known if _alike(unigram[b.row], unigram[one.row])]
            if known:
                best[name] = min(known, key=lambda b, name=name: b.figures[name].mean)
        over = {n: _percent_less(one.figures[n], other.figures[n]) for n, other in best.items() if n in one.figures}
        rival = best.get("bits_per_byte")
        wins = None if rival is None or rival.row == one.row else _wins(bits[one.row], bits[rival.row])
        held.append(replace(one, over_best=over, wins=wins))
    return held


def _sources(scores: Mapping[tuple[int, str], float]) -> set[str]:
    return {source for _, source in scores}


def _alike(mine: Mapping[tuple[int, str], float], theirs: Mapping[tuple[int, str], float]) -> bool:
    """Whether, by unigram models, texts were cut into the same tokens; a trimmed vocabulary's differs by a hair."""
    return all(math.isclose(mine[key], theirs[key], rel_tol=0.002) for key in mine.keys() & theirs.keys())


def _percent_less(mine: Spread, theirs: Spread) -> float:
    return 100 * (1 - mine.mean / theirs.mean)


def _standing(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> Standing:
    first, over = cells[0], [outcomes[cell.name] for cell in cells]
    figures = {}
    for name, (key, held_out) in FIGURES.items():
        seeds: dict[int, list[float | None]] = {}
        for cell in cells:
            one = outcomes[cell.name]
            seeds.setdefault(cell.seed, []).append(one.mean(key, held_out) if one.finished else None)
        whole = [_mean(values) for values in seeds.values()]
        if known := [value for value in whole if value is not None and math.isfinite(value)]:
            figures[name] = Spread.of(known)
    activations = [one.activation for one in over if one.activation is not None]
    return Standing(
        row=first.row, variant=first.variant, point=first.point, baseline=study.variants[first.variant].baseline,
        tried=first.tried, tokens=first.tokens, sent_bytes=round(fmean(one.sent_bytes for one in over)),
        runs=len(over), figures=figures, diverged=sum(one.diverged for one in over),
        errors=tuple(one.error for one in over if one.error),
        activation=fmean(activations) if activations else None,
    )  # fmt: skip


def _by_source(
    cells: Iterable[Cell], outcomes: Mapping[str, Outcome], figure: str = "bits_per_byte"
) -> dict[tuple[int, str], float]:
    """A figure by seed and source: of several bodies, the mean."""
    found: dict[tuple[int, str], list[float]] = {}
    for cell in cells:
        for source, score in outcomes[cell.name].scores.items() if outcomes[cell.name].finished else ():
            value = score[figure]
            found.setdefault((cell.seed, source), []).append(math.inf if value is None else value)
    return {key: fmean(values) for key, values in found.items()}


def _wins(mine: Mapping[tuple[int, str], float], theirs: Mapping[tuple[int, str], float]) -> tuple[int, int] | None:
    """None: there is no source that both were scored on."""
    both = mine.keys() & theirs.keys()
    return (sum(mine[key] < theirs[key] for key in both), len(both)) if both else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None: one of them is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
