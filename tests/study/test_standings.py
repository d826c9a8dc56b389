"""Means and spreads over seeds, improvement over the best baseline, and wins: by hand, and as they are written down."""

import doctest
import json
from typing import Any

import pytest
from tiny import tiny_study

from dept_ray.study import standings as module
from dept_ray.study.cells import Cell, cells_of
from dept_ray.study.outcomes import Outcome
from dept_ray.study.standings import Spread, standings
from dept_ray.study.study_file import Study
from dept_ray.study.study_table import as_json, markdown

UNIGRAM = 4.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("standings")
    variants: dict[str, Any] = {
        "std": {"job": {"method": "std"}, "baseline": True},
        "act": {"job": {"method": "act"}, "baseline": True},
        "spec": {"job": {"method": "spec"}},
    }
    return tiny_study(folder, variants, seeds=(0, 1), adaptations={"random": {}})


def scored(inside: float, outside: float | None = None) -> Outcome:
    """Of two sources in distribution, one a bit worse and one a bit better, and one out of it."""
    bits = {"code": inside + 0.1, "latin": inside - 0.1} | ({} if outside is None else {"numbers": outside})
    scores: dict[str, dict[str, Any]] = {
        source: {"bits_per_byte": value, "perplexity": 10 * value, "unigram_bits_per_byte": UNIGRAM}
        for source, value in bits.items()
    }
    if outside is not None:
        scores["numbers"]["held_out"] = True
    return Outcome("finished", scores, rounds=3, tokens=100, sent_bytes=2000)


def told(study: Study, **bits: tuple[float, float]) -> tuple[list[Cell], dict[str, Outcome]]:
    """Bodies that ended with these bits per byte under both seeds."""
    outcomes = {f"s.{row}.s{seed}": scored(value) for row, both in bits.items() for seed, value in enumerate(both)}
    return cells_of(study, outcomes), outcomes


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


def test_mean_and_spread_are_over_seeds_and_improvement_over_the_best_baseline(study: Study) -> None:
    std, act, spec = standings(study, *told(study, std=(3.0, 3.2), act=(2.0, 2.2), spec=(1.0, 1.1)))
    assert std.figures["bits_per_byte"] == Spread(pytest.approx(3.1), pytest.approx(0.141421, rel=1e-4), 2)
    assert spec.over_best["bits_per_byte"] == pytest.approx(50.0)
    assert act.over_best["bits_per_byte"] == 0
    assert std.over_best["bits_per_byte"] == pytest.approx(-100 / 2.1)
    assert spec.figures["perplexity"].mean == pytest.approx(10.5)


def test_wins_are_counted_over_sources_and_seeds_against_the_best_baseline(study: Study) -> None:
    std, act, spec = standings(study, *told(study, std=(3.0, 3.0), act=(2.0, 2.0), spec=(1.5, 2.5)))
    assert (std.wins, act.wins, spec.wins) == ((0, 4), None, (2, 4))


def test_what_was_measured_on_other_text_or_tokens_is_not_held_against_it(study: Study) -> None:
    cells, outcomes = told(study, std=(3.0, 3.0), act=(2.0, 2.0), spec=(1.0, 1.0))
    for seed in (0, 1):
        for score in outcomes[f"s.spec.s{seed}"].scores.values():
            score["unigram_bits_per_byte"] = 1.05 * UNIGRAM
        act = outcomes[f"s.act.s{seed}"].scores
        act["share"] = act.pop("code")
    std, act, spec = standings(study, cells, outcomes)
    assert spec.over_best.keys() == {"bits_per_byte"}, "whose tokens are its own"
    assert spec.over_best["bits_per_byte"] == pytest.approx(100 * 2 / 3), "and the better baseline's text is another"
    assert std.over_best == {"bits_per_byte": 0, "perplexity": 0}
    assert (act.over_best, act.wins, spec.wins) == ({"bits_per_byte": 0, "perplexity": 0}, None, (4, 4))


def test_what_is_held_out_has_figures_of_its_own(study: Study) -> None:
    cells, outcomes = told(study, std=(3.0, 3.0), spec=(3.0, 3.0))
    outcomes |= {c.name: scored(2.0, 5.0 if c.variant == "std" else 4.0) for c in cells if c.adaptation}
    std, spec = standings(study, cells, outcomes, "random")
    assert std.figures["bits_per_byte_held_out"].mean == 5.0
    assert spec.over_best["bits_per_byte_held_out"] == pytest.approx(20.0)
    assert spec.over_best["bits_per_byte"] == 0
    assert spec.wins == (2, 6), "out of distribution, under both seeds"


def test_a_run_that_failed_is_in_the_table_and_in_no_mean(study: Study) -> None:
    cells, outcomes = told(study, std=(3.0, 3.0), spec=(2.0, 2.0))
    outcomes["s.spec.s1"] = Outcome("failed", error="QuorumLost: loss: nan, training diverged")
    _, spec = standings(study, cells, outcomes)
    assert (spec.figures["bits_per_byte"].seeds, spec.figures["bits_per_byte"].deviation) == (1, None)
    assert (spec.diverged, spec.runs) == (1, 2)
    text = markdown(study, cells, outcomes)
    assert "1 of 2 failed" in text
    assert "- s.spec.s1: QuorumLost: loss: nan, training diverged" in text


def test_who_knows_less_than_a_unigram_model_has_diverged() -> None:
    assert scored(UNIGRAM + 0.01).diverged
    assert not scored(UNIGRAM - 0.01).diverged


def test_the_table_is_markdown_with_a_line_a_row(study: Study) -> None:
    cells, outcomes = told(study, std=(3.0, 3.2), act=(2.0, 2.2), spec=(1.0, 1.1))
    text = markdown(study, cells, outcomes)
    (line,) = [line for line in text.splitlines() if line.startswith("| spec ")]
    assert line == "| spec | 4.61k | 1.050 ± 0.071 | +50.0 % | 2.00 kB |  |"
    assert "**6 runs are not over yet.**" in text
    assert "Nothing is adapted yet." in text
    figures = json.loads(json.dumps(as_json(study, cells, outcomes)))
    assert figures["bodies"][2]["over_best"]["bits_per_byte"] == pytest.approx(50.0)
    assert figures["runs"]["s.std.s0"]["phase"] == "finished"


def test_over_a_grid_it_is_told_who_survives(study: Study) -> None:
    grid = study.model_copy(update={"grid": {"inner.lr": (0.1, 1.0)}, "seeds": (0,)})
    cells = cells_of(grid, {})
    bits = {"std lr 0.1": 3.0, "std lr 1.0": 4.5, "act lr 0.1": 5.0, "act lr 1.0": 6.0, "spec lr 0.1": 3.0}
    outcomes = {cell.name: scored(bits.get(cell.row, 2.0)) for cell in cells}
    lines = {line.split(" | ")[0]: line for line in markdown(grid, cells, outcomes).splitlines()}
    assert lines["| std"] == "| std | 3.000 | 4.500 diverged | 0.1 |"
    assert lines["| act"] == "| act | 5.000 diverged | 6.000 diverged | none |"
    assert lines["| spec"] == "| spec | 3.000 | 2.000 | 1.0 |"
