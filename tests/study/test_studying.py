"""A study runs what is not done, takes a failure for a result, and ends with its tables and pages."""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import tiny_study

from dept_ray import studying
from dept_ray.cli import main
from dept_ray.config import Job
from dept_ray.errors import RunError, SourceError, WrongRunError
from dept_ray.in_process import train_here
from dept_ray.metrics import read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.study.study_file import Study
from dept_ray.studying import folder_of, here, known, run_study, write_pages

VARIANTS: dict[str, Any] = {
    "std": {"job": {"method": "std"}, "baseline": True, "sweep": {"inner.lr": (1e-2, 3e-2)}},
    "glob-dealt": {"job": {"method": "glob"}, "dealt": True},
    "alone": {"job": {"method": "isolated"}},
}
ADAPTATIONS = {"random": {"job": {"rounds": {"total": 1}}}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that ran to its end; to be read only."""
    folder = tmp_path_factory.mktemp("study")
    study = tiny_study(folder, VARIANTS, ("numbers",), adaptations=ADAPTATIONS)
    run_study(study, here)
    return study


def test_every_run_is_an_ordinary_one(done: Study) -> None:
    cells, outcomes = known(done)
    assert {cell.name for cell in cells} == outcomes.keys()
    assert len(cells) == 2 + 1 + 1 + (1 + 1 + 2)
    for cell in cells:
        assert read_records(run_folder(cell.job) / "metrics.jsonl")[-1]["event"] == "scores"


def test_the_table_has_a_line_a_variant_and_the_pages_open(done: Study) -> None:
    text = (folder_of(done) / "table.md").read_text()
    bodies, adapted = text.split("## Adapted: random")
    for part in (bodies, adapted):
        assert [line.split(" ")[1] for line in part.splitlines() if line.startswith("| ")][2:] == list(VARIANTS)
    assert "runs are not over" not in text
    assert "out of it" in adapted
    (dealt,) = (line for line in bodies.splitlines() if line.startswith("| glob-dealt "))
    assert "on held-out text of its own" in dealt
    assert "%" not in dealt, "which is not held against a baseline on other text"
    assert "lr 0.0" in adapted, "which value of the sweep was taken"
    figures = json.loads((folder_of(done) / "figures.json").read_text())
    assert figures["adaptations"]["random"][2]["runs"] == 2, "of two bodies"
    assert [page.name for page in write_pages(done, *known(done))] == ["report.html", "report-random.html"]


def test_what_is_done_is_not_done_again(done: Study) -> None:
    def never(jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
        raise AssertionError(jobs)
        yield

    before = (folder_of(done) / "figures.json").read_bytes()
    run_study(done, never)
    assert (folder_of(done) / "figures.json").read_bytes() == before


def test_a_study_without_validation_text_has_dashes(tmp_path: Path) -> None:
    values = tiny_study(tmp_path, {"std": {"job": {"method": "std"}, "baseline": True}}).model_dump()
    for source in values["job"]["sources"]:
        source |= {"validation_paths": (), "validation_share": 0.0}
    study, told = Study.model_validate(values), list[str]()
    run_study(study, here, tell=told.append)
    assert told[-1].startswith("s.std.s0: – bits/byte, ")
    assert "| std | 4.61k | – |" in (folder_of(study) / "table.md").read_text()


def test_preparation_is_shared(done: Study) -> None:
    tokens = list((Path(done.folder) / "data" / "latin").glob("tokens-*"))
    assert len(tokens) == 1, "one for all that have the global tokenizer"
    assert len(list((Path(done.folder) / "data" / "tokenizers").iterdir())) == 2, "and one of the text as it was dealt"


def test_a_study_that_changed_is_told_from_what_was_run(done: Study) -> None:
    job = {**done.job, "model": {**done.job["model"], "width": 64}}
    with pytest.raises(WrongRunError, match=r"to this one before model changed: give the study another `name`"):
        known(done.model_copy(update={"job": job}))


def test_a_body_that_was_trained_anew_is_noticed(done: Study) -> None:
    cells, _ = known(done)
    (adapted,) = (cell for cell in cells if cell.variant == "std" and cell.adaptation)
    config = run_folder(adapted.job) / "config.json"
    kept = config.read_text()
    try:
        values = json.loads(kept)
        values["job"]["init"]["fingerprint"] = "another"
        config.write_text(json.dumps(values))
        with pytest.raises(WrongRunError, match="adapted another body than"):
            run_study(done, here)
    finally:
        config.write_text(kept)


def test_the_plan_runs_nothing_and_says_what_is_done(done: Study, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        f'name = "s"\nfolder = {json.dumps(done.folder)}\njob = {json.dumps("base.toml")}\n'
        '[variants.std]\nbaseline = true\njob = { method = "std" }\nsweep = { "inner.lr" = [1e-2, 3e-2] }\n'
        '[variants.new]\njob = { method = "glob" }\n'
    )
    lines = [f"{key} = {json.dumps(value)}" for key, value in done.job.items() if not isinstance(value, dict | list)]
    for key, value in done.job.items():
        tables = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
        for table in tables:
            lines.append(f"[[{key}]]" if isinstance(value, list) else f"[{key}]")
            lines += [f"{name} = {json.dumps(inner)}" for name, inner in table.items()]
    (tmp_path / "base.toml").write_text("\n".join(lines))
    result = CliRunner().invoke(main, ["study", str(path), "--plan"])
    assert result.exit_code == 0, result.output
    words = [line.split() for line in result.stdout.splitlines()]
    states = {line[0]: " ".join(line[2:]) for line in words if line and line[0].startswith("s.")}
    assert states["s.std.lr0.01.s0"].startswith("finished, 6 of 6 rounds")
    assert states["s.new.s0"] == "to do"
    assert not (Path(done.folder) / "runs" / "s.new.s0").exists()


def test_side_by_side_is_for_a_cluster(tmp_path: Path) -> None:
    assert "--parallel needs Ray" in CliRunner().invoke(main, ["study", "x", "--local", "--parallel", "2"]).output


def test_what_is_over_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_records_of(file: Path) -> list[dict[str, Any]]:
        read.append(file.parent.name)
        return read_records(file)

    monkeypatch.setattr("dept_ray.study.outcomes.read_records", read_records_of)
    study = tiny_study(tmp_path, {name: {} for name in ("a", "b", "c")})
    run_study(study, fake("it failed")[1])
    assert sorted(read) == ["s.a.s0", "s.b.s0", "s.c.s0"]


# Failing.


def fake(error: str = "", fails: type[Exception] | None = None) -> tuple[list[str], studying.Train]:
    """Runs that begin and are over, without training."""
    asked: list[str] = []

    def train(jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
        for job in jobs:
            asked.append(job.name)
            run_folder(job).mkdir(parents=True, exist_ok=True)
            (run_folder(job) / "config.json").write_text(json.dumps({"identity": job.identity}))
            if fails is not None:
                raise fails("no")
            yield job, error

    return asked, train


def test_a_run_that_was_cut_off_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    cut, whole = (tiny_study(tmp_path / at, {"std": VARIANTS["std"] | {"sweep": {}}}) for at in ("cut", "whole"))

    def two_rounds(jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
        control = Control()
        train_here(jobs[0], lambda record: control.stop() if record["round"] == 2 else None, control=control)
        yield jobs[0], ""

    with pytest.raises(RunError, match=r"run s\.std\.s0 was stopped before its last round"):
        run_study(cut, two_rounds)
    run_study(cut, here)
    run_study(whole, here)
    assert known(cut)[1]["s.std.s0"].scores == known(whole)[1]["s.std.s0"].scores


def test_a_run_that_fails_is_a_result_and_not_the_end(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"a": {}, "b": {}}, adaptations=ADAPTATIONS)
    asked, train = fake("QuorumLost: loss: nan, training diverged")
    run_study(study, train)
    assert asked == ["s.a.s0", "s.b.s0"]
    assert "s.b.s0: QuorumLost: loss: nan, training diverged" in (folder_of(study) / "table.md").read_text()
    run_study(study, train)
    assert len(asked) == 2, "it would fail again in the same way"
    run_study(study, train, retry=True)
    assert len(asked) == 4


def test_a_silo_that_fails_in_this_process_is_a_result_too(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"large": {"job": {"method": "glob", "inner": {"batch_size": 4608}}}})
    study = study.model_copy(update={"job": {**study.job, "rounds": {"total": 1152}, "inner": {**study.job["inner"]}}})
    run_study(study, here)
    assert "SiloError: source" in (folder_of(study) / "table.md").read_text()


def test_what_concerns_every_run_ends_the_study(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"a": {}})
    for error in (SourceError, WrongRunError):
        with pytest.raises(error):
            run_study(study, fake(fails=error)[1])
    with pytest.raises(RunError, match=r"run s\.a\.s0 was stopped before its last round"):
        run_study(study, fake()[1])
