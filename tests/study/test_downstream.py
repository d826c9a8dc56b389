"""A model learns tasks with labels from small files of their columns, better than chance by far, and twice the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny import SOURCES, document, ready_job

from dept_ray.cli import main
from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.errors import ConfigError, SourceError
from dept_ray.in_process import train_here
from dept_ray.rounds.folder import run_folder
from dept_ray.study import tuned
from dept_ray.study.downstream import downstream
from dept_ray.study.examples import TASKS, load_examples
from dept_ray.study.tuned import Settings

QUICK = Settings(epochs=5, batch_size=16, lr=3e-3)
EXAMPLES, HELD_OUT = 160, 80


def snippet(source: str, draw: np.random.Generator, size: int = 24) -> str:
    """Some characters of one of the little languages."""
    start = int(draw.integers(900))
    return document(source, int(draw.integers(40)))[start : start + size]


def a_row(task: str, draw: np.random.Generator) -> dict[str, Any]:
    """One example whose answer is which language a part of it is, or how much of it."""
    which = int(draw.integers(3))
    if task == "sst2":
        return {"sentence": snippet(SOURCES[which], draw), "label": which % 2, "idx": 0}
    if task == "mnli":
        return {"premise": snippet(SOURCES[which], draw), "hypothesis": snippet("latin", draw), "label": which}
    if task == "stsb":
        size = int(draw.integers(21))
        sentence = snippet("latin", draw, size) + snippet("numbers", draw, 20 - size)
        return {"sentence1": snippet("code", draw, 8), "sentence2": sentence, "label": size / 4}
    place = int(draw.integers(4))
    options = [snippet("latin" if i == place else ("code", "numbers")[i % 2], draw) for i in range(4)]
    return {"article": snippet("code", draw, 400), "question": "x?", "options": options, "answer": "ABCD"[place]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, str]]:
    """`files(task)`: training examples as jsonl, those to measure on as parquet."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(task: str) -> tuple[str, str]:
        draw = generator("downstream", task)
        rows = [a_row(task, draw) for _ in range(EXAMPLES + HELD_OUT)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:EXAMPLES]))
        pq.write_table(pa.Table.from_pylist(rows[EXAMPLES:]), folder / f"{task}.parquet")
        return str(folder / f"{task}.jsonl"), str(folder / f"{task}.parquet")

    return write


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """`run(method)`: a tiny run of one round, trained once for this module."""
    made: dict[str, Job] = {}

    def train(method: str) -> Job:
        if method not in made:
            made[method] = ready_job(prepared, tmp_path_factory.mktemp(method), method, rounds={"total": 1})
            train_here(made[method], lambda record: None)
        return made[method]

    return train


def tune(job: Job, task: str, files: tuple[str, str], source: str | None = "latin", **more: Any) -> dict[str, Any]:
    return downstream(job, run_folder(job), task, source, *files, **{"settings": QUICK, **more})


# What is learnt.


@pytest.mark.parametrize(("task", "least"), [("sst2", 0.9), ("mnli", 0.7), ("stsb", 0.7), ("race", 0.7)])
def test_every_kind_of_task_is_learnt_well_above_chance(run, files, task: str, least: float):
    found = tune(run("glob"), task, files(task), baseline=False)
    metric = found["metric"]
    assert metric == ("pearson" if task == "stsb" else "accuracy")
    assert found["chance"] < least - 0.15 < least < found["bodies"]["trained"][metric]
    assert found["examples"] == {"train": EXAMPLES, "validation": HELD_OUT}


def test_it_is_the_same_twice_and_leaves_the_run_as_it_was(run, files):
    job = run("glob")
    before = {path: path.read_bytes() for path in run_folder(job).rglob("*") if path.is_file()}
    first, second = (tune(job, "sst2", files("sst2"), settings=Settings(epochs=1, lr=1e-3)) for _ in range(2))
    assert first == second
    assert first["bodies"]["trained"] != first["bodies"]["random"]
    assert before == {path: path.read_bytes() for path in run_folder(job).rglob("*") if path.is_file()}


def test_a_batch_in_pieces_is_the_same_batch(run, files, monkeypatch: pytest.MonkeyPatch):
    settings = Settings(epochs=1, batch_size=32, lr=1e-3)
    whole = tune(run("glob"), "race", files("race"), settings=settings, baseline=False)
    monkeypatch.setattr(tuned, "TOKENS_AT_ONCE", 5 * 4 * 32)
    pieces = tune(run("glob"), "race", files("race"), settings=settings, baseline=False)
    assert pieces["bodies"]["trained"]["loss"] == pytest.approx(whole["bodies"]["trained"]["loss"], rel=1e-5)


def test_a_source_is_chosen_by_the_task_s_text_and_what_it_has_no_row_for_is_left_out(run, files):
    job, quick = run("spec"), Settings(epochs=1, most=20)
    chosen = tune(job, "stsb", files("stsb"), source=None, settings=quick, baseline=False)
    assert chosen["source"] in SOURCES
    assert chosen["examples"] == {"train": 20, "validation": 20}
    assert tune(job, "sst2", files("sst2"), "numbers", settings=quick, baseline=False)["left_out"] > 0.05
    assert tune(run("glob"), "sst2", files("sst2"), settings=quick, baseline=False)["left_out"] == 0


def test_the_command_writes_what_it_tells(run, files, tmp_path: Path):
    job, (train, validation) = run("spec-opt"), files("sst2")
    ask = ["finetune", str(run_folder(job)), "sst2", "--source", "latin", "--epochs", "1", "--lr", "0.001"]
    out = tmp_path / "a" / "figures.json"
    told = CliRunner().invoke(main, [*ask, "--train", train, "--validation", validation, "--out", str(out)])
    assert told.exit_code == 0, told.output
    found = json.loads(out.read_text())
    assert found["bodies"].keys() == {"trained", "random"}
    for figures in found["bodies"].values():
        assert f"{figures['accuracy']:.4f}" in told.stdout
    assert (found["settings"]["batch_size"], found["settings"]["betas"]) == (128, [0.9, 0.98]), "as the paper has it"


# What is refused, before a model is loaded.


def test_a_task_or_a_file_that_is_not_there_is_told(run, files):
    job = run("glob")
    with pytest.raises(ConfigError, match='no task "sst"; did you mean sst2'):
        tune(job, "sst", files("sst2"))
    with pytest.raises(ConfigError, match="name both files, or none"):
        downstream(job, run_folder(job), "sst2", "latin", train=files("sst2")[0])
    with pytest.raises(SourceError, match=r"none\.jsonl cannot be read"):
        tune(job, "sst2", ("none.jsonl", "none.jsonl"))
    with pytest.raises(SourceError, match=r"name a file that ends in \.parquet or \.jsonl"):
        tune(job, "sst2", ("none.csv", "none.csv"))
    with pytest.raises(ConfigError, match=r"lr = 0: must be above 0"):
        Settings(lr=0)


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("sst2", {"text": "a", "label": 0}, 'row 1: no column "sentence"; it has text, label'),
        ("sst2", {"sentence": "a", "label": -1}, "row 1: label = -1 is no class of the task"),
        ("sst2", {"sentence": "a", "label": 7}, r"rows\.jsonl, row 1: label = 7 is no class .*known: 0, 1; .*leave"),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": 3}, "row 1: label = 3 is no class .*known: 0, 1, 2;"),
        ("sst2", {"sentence": None, "label": 0}, "row 1: None is no text"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "much"}, "row 1: label = 'much' must be a number"),
        ("race", {"article": "a", "question": "b", "options": ["c", "d"], "answer": "E"}, "a letter from A to B"),
        ("race", {"article": "a", "question": "b", "options": ["c"], "answer": "A"}, "no list of two texts or more"),
    ],
)
def test_a_row_that_is_not_of_the_task_is_told(tmp_path: Path, task: str, row: dict[str, Any], told: str):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(SourceError, match=told):
        load_examples(TASKS[task], "train", str(file))


def test_a_class_that_is_only_measured_is_told(run, tmp_path: Path):
    files = [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]
    for file, labels in zip(files, ([0, 1], [0, 2]), strict=True):
        rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in labels]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"label: 2 classes to train on, \[2\] beside them"):
        tune(run("glob"), "mnli", (str(files[0]), str(files[1])))
