"""The curve of a run, what lies below it, and when it reaches what another ended with."""

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.in_process import train_here
from dept_ray.metrics import Record, read_records
from dept_ray.rounds.folder import run_folder
from dept_ray.study import plasticity
from dept_ray.study.adapt import adapt_job, adaptation
from dept_ray.study.plasticity import area, curve, plasticity_table, steps_to


def records(*bits: float, steps: int = 10, source: str = "de") -> list[Record]:
    """Of a run of rounds of `steps`, measured before each round and at the end."""
    scores = [{"scores": {source: {"bits_per_byte": value}}} for value in bits]
    rounds = [
        {"event": "round", "round": i + 1, "step": steps * (i + 1), **score} for i, score in enumerate(scores[:-1])
    ]
    return [*rounds, {"event": "scores", "round": len(rounds), **scores[-1]}]


def cells(table: Any) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(plasticity).failed == 0


def test_scores_belong_to_the_steps_that_were_behind_them():
    assert curve(records(5, 4, 3), "de") == [(0, 5), (10, 4), (20, 3)]
    assert curve(records(5, 4, 3), "fr") == []


def test_a_round_that_was_not_measured_leaves_a_straight_line():
    sparse = records(5, 4, 3)
    del sparse[1]["scores"]
    assert curve(sparse, "de") == [(0, 5), (20, 3)]
    assert area(curve(sparse, "de")) == 80


def test_the_faster_learner_has_the_smaller_area_and_is_there_sooner():
    slow, fast = curve(records(5, 4, 3, 2), "de"), curve(records(5, 2.5, 2, 1.9), "de")
    assert area(fast) < area(slow)
    assert steps_to(fast, slow[-1][1]) == 20
    assert steps_to(slow, fast[-1][1]) is None
    assert steps_to(fast, 6) == 0


def test_nothing_measured_is_no_figure():
    assert math.isnan(area([]))
    assert steps_to([], 1.0) is None


def test_the_table_holds_one_run_against_another():
    table = plasticity_table(records(5, 2.5, 2), "x", records(5, 4, 3), "baseline")
    assert [column[0] for column in cells(table)] == ["de", "5.0000", "2.0000", "3.0000", "20", "3.0000", "4.0000", "8"]
    assert len(table.columns) == 8
    assert [column[0] for column in cells(plasticity_table(records(5, 3), "x"))][-1] == "10"
    never = plasticity_table(records(5, 4), "x", records(5, 3), "baseline")
    assert cells(never)[-1] == ["never"]


def test_a_real_run_has_a_curve_to_its_last_step(tiny: Callable[..., Job]):
    job = tiny("std")
    train_here(job, lambda record: None)
    found = curve(read_records(run_folder(job) / "metrics.jsonl"), "latin")
    assert [step for step, _ in found] == [0, 4, 8, 12]
    assert found[-1][1] < found[0][1]


def test_what_a_file_leaves_open_comes_from_the_run_and_the_paper(tiny: Callable[..., Job]):
    run = tiny("glob", model={"positions": 48})
    random, own = adaptation(run, {}), adaptation(run, {"init": {"embedding": "own"}})
    assert random["inner"] == {"lr": 1e-2, "local_steps": 4, "batch_size": 4, "context": 32, "warmup_steps": 1}
    assert own["inner"]["lr"] == 5e-3
    assert random["rounds"]["total"] == 1
    assert adaptation(run, {"inner": {"local_steps": 1}})["rounds"]["total"] == 3
    assert (random["method"], random["model"]["positions"], random["model"]["width"]) == ("std", 48, 32)
    assert random["tokenizer"]["vocab_size"] == 300
    assert own["tokenizer"]["kind"] == "file"
    assert adaptation(run, {"init": {"embedding": "own"}, "tokenizer": {"kind": "bpe"}})["tokenizer"] == {}


@pytest.mark.parametrize(
    ("warmup", "rounds", "steps"),
    [(100, 50, 20), (100, 5, 2), (200, 50, 40), (900, 50, 50), (100, 1, 1), (0, 50, 0), (1, 50, 1)],
)
def test_the_warm_up_of_the_run_is_taken_over_in_proportion_and_is_a_tenth_at_most(
    tiny: Callable[..., Job], warmup: int, rounds: int, steps: int
):
    run = tiny("std", inner={"local_steps": 10, "warmup_steps": warmup}, rounds={"total": 250})
    assert adaptation(run, {"rounds": {"total": rounds}})["inner"]["warmup_steps"] == steps


def test_a_round_that_the_run_has_not_is_told_with_those_that_it_has(tiny: Callable[..., Job], tmp_path: Path):
    job = tiny("std")
    train_here(job, lambda record: None)
    file = tmp_path / "one.toml"
    file.write_text(f'[[sources]]\nname = "latin"\nkind = "files"\npaths = {list(job.source("latin").paths)}\n')
    with pytest.raises(ConfigError, match=r"init\.round = 99: run .* does not have it \(any more\); it has 2, 3$"):
        adapt_job(run_folder(job), file, init={"round": 99})
    assert adapt_job(run_folder(job), file, init={"round": 2}).init.round == 2
