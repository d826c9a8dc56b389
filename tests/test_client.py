"""A run in a notebook: its records as tables, its charts, its scores and its text, from the folder alone."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ready_job

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.errors import ConfigError, RunError, StoreError
from dept_ray.in_process import train_here
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.study.tables import table_of


def opened(job: Job) -> Run:
    return Run.open(Path(job.folder) / "runs" / job.name)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three rounds that `code` left after the first, and `sums` joined after it."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "new.txt").write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(40)))
    (folder / "old.txt").write_text("".join(f"{a} minus {b} is {a - b}\n" for a in range(20) for b in range(9)))
    texts = {"paths": [str(folder / "new.txt")], "validation_paths": [str(folder / "old.txt")]}
    control = Control()

    def meddle(record: dict[str, Any]) -> None:
        if record["event"] == "round" and record["round"] == 1:
            control.change({"drop": "code"}, "a")
            control.change({"add": {"name": "sums", "kind": "files", **texts}}, "b")

    job = ready_job(prepared, folder / "run", "spec-opt", inner={"local_steps": 2})
    train_here(job, meddle, control=control)
    return opened(job)


def test_a_row_for_each_silo_in_each_round(run: Run):
    table = run.table()
    assert list(zip(table["round"], table["silo"], strict=True)) == [
        (1, "code"), (1, "latin"), (1, "numbers"), (2, "latin"), (2, "numbers"), (2, "sums"), (3, "latin"),
        (3, "numbers"), (3, "sums"),
    ]  # fmt: skip
    first = run.history()[0]["silos"]["code"]
    row = table.iloc[0]
    assert (row["loss"], row["norm"], row["up_bytes"]) == (first["loss"], first["norm"], first["up_bytes"])
    assert row["train_s"] == first["seconds"]["train"]
    assert set(table["refused"]) == {""}


def test_a_row_for_each_round(run: Run):
    table = run.table("rounds")
    rounds = [record for record in run.history() if record["event"] == "round"]
    assert list(table["round"]) == [1, 2, 3]
    assert list(table["loss"]) == [record["loss"] for record in rounds]
    assert list(table["up_bytes"]) == [record["sent_bytes"]["up"] for record in rounds]
    assert list(table["away"]) == [0, 1, 1]


def test_a_row_for_each_measured_state_and_source(run: Run):
    table = run.table("scores").set_index(["round", "source"])
    assert table["bits_per_byte"][(0, "latin")] == run.history()[0]["scores"]["latin"]["bits_per_byte"]
    assert table["bits_per_byte"][(3, "sums")] == run.history()[-1]["scores"]["sums"]["bits_per_byte"]
    assert table.index.is_unique


def test_why_an_answer_did_not_count_is_in_the_table():
    record = {"event": "round", "round": 4, "silos": {}, "refused": {"de": "body: not finite"}}
    assert table_of([record]).to_dict("records") == [{"round": 4, "silo": "de", "refused": "body: not finite"}]


@pytest.mark.parametrize("of", ["rounds", "silos", "scores"])
def test_a_run_that_has_not_begun_has_an_empty_table(of: str):
    table = table_of([], of)
    assert len(table) == 0
    assert "round" in table


def test_an_unknown_table_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match='no table "score"; did you mean scores'):
        table_of([], "score")


def test_charts_are_shown_by_a_notebook_beside_those_of_other_runs(run: Run):
    html = run.plot()._repr_html_()
    assert html.count("<svg") == 7
    both = run.plot(run)._repr_html_()
    assert both.count("<svg") == 14
    assert str(run.folder) in both, "two runs of one name go by their folders"


def test_charts_need_no_plotting_library(run: Run):
    run.plot()
    assert "matplotlib" not in sys.modules


def test_scores_made_now_are_those_of_the_last_record(run: Run):
    record, last = run.score(), run.history()[-1]
    assert (record["event"], record["round"]) == ("scores", 3)
    assert {source: record["scores"][source] for source in last["scores"]} == last["scores"]
    assert record["scores"].keys() == {"latin", "numbers", "sums", "code"}, "who left is measured too, as it was left"


def test_text_hangs_on_the_seed_and_comes_from_the_source_that_is_named(run: Run):
    def text(**how: Any) -> str:
        return "".join(run.sample(**how))

    assert text(tokens=12) == text(tokens=12, source="code"), "the first"
    assert text(source="sums", prompt="3 plus ", tokens=12, seed=1) == text(
        source="sums", prompt="3 plus ", tokens=12, seed=1
    ), "also of one that joined"
    with pytest.raises(ConfigError, match="did you mean latin"):
        run.sample(source="latn")
    with pytest.raises(ConfigError, match="temperature = -1"):
        text(temperature=-1)


def test_a_run_without_a_round_is_not_used(tiny: Callable[..., Job]):
    job = tiny("spec")
    RunStore(job)
    for use in (Run.score, Run.sample):
        with pytest.raises(StoreError, match="no committed round yet: train first"):
            use(opened(job))


def test_a_run_in_one_process_is_watched_there_alone(tiny: Callable[..., Job]):
    store = RunStore(tiny("spec"))
    store.hold()
    with pytest.raises(RunError, match=rf"in progress in one process, without Ray \(process {os.getpid()} on .*Ctrl-C"):
        Run.attach(store.folder)
    with pytest.raises(RunError, match=rf"is in progress \(process {os.getpid()} on [^(){{}}]*\): follow it"):
        Run.start(store.job)
    store.let_go()
    with pytest.raises(RunError, match="is not in progress; `dept-ray train` goes on with it"):
        Run.attach(store.folder)
    (store.folder / "live.json").write_text('{"pid": 1, "host": "gone", "address": "127.0.0.1:9"}')
    with pytest.raises(RunError, match=r"is not in progress \(no Ray cluster answers .*\); `dept-ray train` goes on"):
        Run.attach(store.folder)
