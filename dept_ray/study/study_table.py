"""A study's tables as Markdown, and all its figures as JSON: what `standings` found, written down."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dept_ray.console import human
from dept_ray.study.cells import Cell
from dept_ray.study.outcomes import Outcome
from dept_ray.study.standings import Spread, Standing, standings
from dept_ray.study.study_file import Point, Study


def markdown(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> str:
    """A table of the bodies, one of each adaptation and, where there is a grid, who survives it."""
    todo = [cell for cell in cells if cell.name not in outcomes]
    parts = [f"# Study {study.name}", _words(study, todo)]
    bodies = standings(study, cells, outcomes)
    if study.grid:
        parts += ["## Over the grid", _pivot(study, bodies)]
    parts += ["## Bodies, as they were trained", _bodies(study, bodies)]
    for name in study.adaptations:
        found = standings(study, cells, outcomes, name)
        parts += [f"## Adapted: {name}", _adapted(study, found) if found else "Nothing is adapted yet."]
    errors = sorted({f"{cell.name}: {outcomes[cell.name].error}" for cell in cells if _error(cell, outcomes)})
    parts += ["## What failed", "\n".join(f"- {line}" for line in errors)] if errors else []
    return "\n\n".join(parts) + "\n"


def as_json(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Everything: the study, its tables, and the outcome of every run."""
    tables = {name: standings(study, cells, outcomes, name) for name in ("", *study.adaptations)}
    return {
        "study": study.model_dump(mode="json"),
        "bodies": [dataclasses.asdict(standing) for standing in tables.pop("")],
        "adaptations": {name: [dataclasses.asdict(s) for s in found] for name, found in tables.items()},
        "runs": {
            cell.name: {
                "row": cell.row, "seed": cell.seed, "adaptation": cell.adaptation, "taken": cell.taken,
                "tokens": cell.tokens, **(dataclasses.asdict(outcomes[cell.name]) if cell.name in outcomes else {}),
            }
            for cell in cells
        },
    }  # fmt: skip


def plan_table(cells: Sequence[Cell], found: Mapping[str, Outcome | None]) -> list[tuple[str, str, str]]:
    """Of each cell: name, tokens, and how far it is.

    Args:
        cells: all that there will be.
        found: what their folders say.
    """
    rows = []
    for cell in cells:
        one = found.get(cell.name)
        state = "to do"
        if one is not None:
            state = f"{one.phase}, {one.rounds} of {cell.job.rounds.total} rounds"
        rows.append((cell.name, human(cell.tokens), state))
    return rows


# ------------------------------------------------------------------------------------------------ tables
def _words(study: Study, todo: Sequence[Cell]) -> str:
    seeds = f"{len(study.seeds)} seeds ({', '.join(map(str, study.seeds))})" if len(study.seeds) > 1 else "one seed"
    spread = "; ± is the standard deviation over seeds" if len(study.seeds) > 1 else ""
    baselines = [name for name, variant in study.variants.items() if variant.baseline]
    against = f" Best baseline: of {', '.join(baselines)}, of each column the best." if baselines else ""
    unfinished = f" **{len(todo)} runs are not over yet.**" if todo else ""
    return (
        f"{seeds.capitalize()}{spread}. Means over sources; less is better. Perplexity compares within one vocabulary, "
        f"bits per byte within the same text.{against}{unfinished}"
    )


def _bodies(study: Study, found: Sequence[Standing]) -> str:
    rivals = any(standing.over_best for standing in found)
    measured = any(standing.activation is not None for standing in found)
    head = ["variant", "tokens", "bits/byte"] + ["better than the best baseline"] * rivals
    head += ["sent"] + ["activations, L2"] * measured + ["remarks"]
    rows = []
    for one in found:
        cells = [one.row, human(one.tokens), _spread(one.figures.get("bits_per_byte"), 3)]
        cells += [_percent(one, "bits_per_byte")] * rivals
        cells += [human(one.sent_bytes, "B") if one.sent_bytes else "nothing"]
        cells += [_plain(one.activation)] * measured
        dealt = ["on held-out text of its own"] * study.variants[one.variant].dealt
        rows.append([*cells, _remarks(study, one, *dealt)])
    return _table(head, rows)


def _adapted(study: Study, found: Sequence[Standing]) -> str:
    held_out = any("perplexity_held_out" in standing.figures for standing in found)
    rivals = any(standing.over_best for standing in found)
    names = [("perplexity", 1), ("bits_per_byte", 3)]
    head = ["variant"]
    for what in ("perplexity", "bits/byte"):
        head += [f"{what}, in distribution", f"{what}, out of it"] if held_out else [what]
    if rivals:
        head += ["perplexity better than the best baseline" + ", in" * held_out] + ["out"] * held_out + ["wins"]
    rows = []
    for one in found:
        cells = [one.row]
        for name, digits in names:
            cells.append(_spread(one.figures.get(name), digits))
            cells += [_spread(one.figures.get(f"{name}_held_out"), digits)] * held_out
        if rivals:
            cells.append(_percent(one, "perplexity"))
            cells += [_percent(one, "perplexity_held_out")] * held_out
            cells.append(f"{one.wins[0]} of {one.wins[1]}" if one.wins else "")
        other = rivals and "perplexity" in one.figures and "perplexity" not in one.over_best
        rows.append([*cells, _remarks(study, one, *["tokens of its own"] * other)])
    return _table([*head, "remarks"], rows)


def _pivot(study: Study, found: Sequence[Standing]) -> str:
    """Bits per byte of each variant at each point, or how many of its runs diverged."""
    at = {(one.variant, one.point): one for one in found}
    across = list(dict.fromkeys(one.point for one in found))
    head = ["variant", *(", ".join(f"{key} {value}" for key, value in point) for point in across), "survives to"]
    rows = []
    for variant in study.variants:
        cells, lived = [], list[Point]()
        for point in across:
            one = at.get((variant, point))
            if one is None:
                cells.append("")
            elif one.diverged:
                known = one.figures.get("bits_per_byte")
                of = f"{one.diverged} of {one.runs}" if one.runs > 1 else ""
                cells.append(" ".join(filter(None, [_spread(known, 3), "diverged", of])))
            else:
                cells.append(_spread(one.figures.get("bits_per_byte"), 3))
                lived.append(point)
        last = ", ".join(str(value) for _, value in lived[-1]) if lived else "none"
        rows += [[variant, *cells, last]] if any(cells) else []
    return _table(head, rows) + "\n\nDiverged: the run failed, or ended with more bits per byte than its unigram model."


def _remarks(study: Study, one: Standing, *more: str) -> str:
    told = ["baseline"] * one.baseline + list(more)
    told += [f"{key} {value} of {_listed(study.variants[one.variant].sweep[key])}" for key, value in one.tried]
    if failed := len(one.errors):
        told.append(f"{failed} of {one.runs} failed")
    if above := one.diverged - failed:
        told.append(f"{above} of {one.runs} above the unigram model")
    return "; ".join(told)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _error(cell: Cell, outcomes: Mapping[str, Outcome]) -> bool:
    return cell.name in outcomes and bool(outcomes[cell.name].error)


def _spread(found: Spread | None, digits: int) -> str:
    if found is None:
        return "–"
    deviation = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:,.{digits}f}{deviation}"


def _percent(one: Standing, figure: str) -> str:
    return f"{one.over_best[figure]:+.1f} %" if figure in one.over_best else ""


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
