"""The command line, from outside and without Ray: what it says, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import SOURCES, document, tiny_job, write_texts

from dept_ray import __version__
from dept_ray.cli import main
from dept_ray.client import Run
from dept_ray.jobfile import load_job
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import read_records
from dept_ray.study.plan import plan
from dept_ray.study.plan_table import headline

JOBS = Path(__file__).parents[1] / "jobs"
PAPER_JOBS = sorted(path for path in JOBS.glob("*.toml") if path.name.startswith(("pile_", "mc4_")))
COMMANDS = (
    "demo", "prepare", "train", "adapt", "status", "score", "generate", "export", "report", "plan", "pause", "submit",
    "region", "study",
)  # fmt: skip


def dept_ray(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], color=True)


def said(*args: str | Path) -> str:
    """What a command that works prints."""
    result = dept_ray(*args)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    return result.stdout


def refused(*args: str | Path) -> str:
    """The one red message of a command that fails on purpose."""
    result = dept_ray(*args)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert not result.stdout
    red, reset = "\x1b[31m", "\x1b[0m\n"
    assert result.stderr.startswith(red)
    assert result.stderr.endswith(reset)
    return result.stderr.removeprefix(red).removesuffix(reset)


def write_job(folder: Path, method: str = "spec", **changes: Any) -> Path:
    """The tiny job as a file, its text beside it, its run under the same folder."""
    job = tiny_job(folder, method, **changes).model_dump(mode="json", exclude_unset=True)
    lines: list[str] = []

    def table(head: str, values: dict[str, Any]) -> None:
        lines.append(head)
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items())

    table("", {key: value for key, value in job.items() if isinstance(value, str | int)})
    for key, value in job.items():
        if isinstance(value, dict):
            table(f"[{key}]", value)
    for source in job["sources"]:
        table("[[sources]]", source)
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def run(job_file: Path) -> Path:
    """The folder of the tiny job's run, trained by the command."""
    said("train", "--local", job_file)
    return job_file.parent / "runs" / "tiny-spec"


# Light.


def test_nothing_heavy_is_imported_before_a_command_is_called():
    code = "import sys, dept_ray.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "ray", "pydantic", "numpy", "rich", "pyarrow", "tokenizers", "datasets", "safetensors"}
    assert not heavy & set(modules)


def test_who_only_starts_or_steers_a_run_needs_no_torch():
    code = "import sys, dept_ray.on_ray.launch, dept_ray.rounds.store; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "dept_ray.on_ray.actors" in modules
    assert not {"torch", "pyarrow", "pandas"} & set(modules)


def test_help_is_told_for_each_command():
    text = said("--help")
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert __version__ in said("--version")
    for command in COMMANDS:
        assert "Usage: " in said(command, "--help")


def test_the_methods_offered_are_those_there_are():
    for command in ("demo", "prepare", "train", "adapt", "plan", "submit"):
        assert f"--method[{'|'.join(METHOD_NAMES)}]" in "".join(said(command, "--help").split())


# Failing on purpose.


def test_an_unknown_job_file_is_one_red_message(tmp_path):
    for command in ("plan", "prepare", "train"):
        message = refused(command, JOBS / "tiny_spek.toml")
        assert message.startswith("ConfigError: job file ")
        assert message.endswith("does not exist; did you mean tiny_spec.toml?")


def test_a_bad_key_is_one_red_message(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[inner]\nbatchsize = 3\n[[sources]]\nname = 'a'\nkind = 'installed'\ncollection = 'docs'")
    assert refused("plan", path) == (
        f"ConfigError: {path}: 1 mistake\n  inner.batchsize: unknown key; did you mean batch_size?"
    )


@pytest.mark.parametrize("command", ["status", "score", "generate"])
def test_an_unknown_run_is_one_red_message(command, run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    message = refused(command, "tiny-spek")
    assert message.startswith('ConfigError: no run "tiny-spek"')
    assert "tiny-spec" in message, "those that there are"


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_run_without_a_round_is_one_red_message(command, run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "no committed round yet: train first" in refused(command, tmp_path)


def test_another_job_of_the_same_name_is_one_red_message(run, job_file):
    message = refused("train", "--local", job_file, "--method", "glob")
    assert message.startswith("WrongRunError: ")
    assert "method: 'spec' there, 'glob' here" in message


def test_an_unknown_source_is_one_red_message(run):
    assert "did you mean latin" in refused("generate", run, "--source", "latn")


def test_a_prompt_that_cannot_be_used_fails_before_anything_is_shown(run):
    message = refused("generate", run, "--source", "latin", "--prompt", "lorus ZQ")
    assert message.startswith("VocabularyError: the prompt holds 'Q', 'Z'")


def test_an_option_out_of_range_is_one_red_message(run):
    assert refused("generate", run, "--tokens", "0") == "ConfigError: num_tokens = 0: must be 1 or more"


def test_submitting_wants_one_thing_at_a_time(job_file):
    for words in ((), (job_file, "--cancel", "x"), ("--attach", "x", "--cancel", "x")):
        result = dept_ray("submit", *words)
        assert result.exit_code == 2
        assert "give one of JOB_FILE, --attach ID and --cancel ID" in result.stderr


def test_a_cluster_that_is_not_there_is_one_red_message(job_file, monkeypatch):
    assert refused("submit", job_file, "--address", "http://127.0.0.1:9").startswith(
        "ClusterError: no Ray dashboard answers at http://127.0.0.1:9 "
    )
    assert "must be a Ray dashboard's http(s)://HOST:PORT" in refused(
        "submit", job_file, "--address", "ray://head:10001"
    )


# Working.


@pytest.mark.parametrize("path", PAPER_JOBS, ids=lambda path: path.stem)
def test_the_plan_of_a_paper_job_begins_with_its_headline(path):
    assert said("plan", path).startswith(headline(plan(load_job(path))) + "\n")


def test_the_plan_of_another_method():
    text = said("plan", JOBS / "mc4_125m_spec.toml", "--method", "glob")
    assert text.startswith("GLOB sends 500 times less than data-parallel training\n")


def test_preparing_twice_does_nothing_and_says_so(tmp_path):
    path = write_job(tmp_path)
    first, second = said("prepare", "--local", path), said("prepare", "--local", path)
    assert first.splitlines()[0] == "reading and cleaning text: 3 of 3"
    assert first.splitlines()[-1] == second.strip() == "tiny-spec: 3 sources are prepared"


def test_training_tells_rounds_and_ends_with_a_table(tmp_path):
    path = write_job(tmp_path, rounds={"total": 2})
    lines = said("train", "--local", path).splitlines()
    words = [line.split()[0] for line in lines if line.startswith(("before", "round", "final"))]
    assert words == ["before", "round", "before", "round", "final"]
    at = lines.index(next(line for line in lines if line.startswith("tiny-spec, spec, after 2 rounds")))
    assert [line.split()[0] for line in lines[at + 4 : at + 7]] == ["code", "latin", "numbers"]
    assert max(map(len, lines)) <= 80
    again = said("train", "--local", path).splitlines()
    assert not any(line.startswith("round ") for line in again), "a run that is over is only scored"
    assert any(line.startswith("final ") for line in again)


def test_a_run_without_validation_text_is_told_to_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [{"name": t["name"], "kind": "files", "paths": t["paths"], "validation_share": 0.0}
               for t in write_texts(tmp_path / "text")]  # fmt: skip
    path = write_job(tmp_path, rounds={"total": 1}, sources=sources)
    one = tmp_path / "one.toml"
    one.write_text("[[sources]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in sources[0].items()))
    told = [
        said("train", "--local", path), said("status", "tiny-spec"), said("score", "tiny-spec"),
        said("score", "tiny-spec", "--source", "latin"), said("adapt", "--local", "runs/tiny-spec", one),
    ]  # fmt: skip
    assert all("–" in text for text in told)
    assert not any("nan" in text or "None" in text for text in told)
    assert "no validation text: give a source validation_paths, or a validation_share" in told[2]


def test_the_status_of_a_run_that_is_over(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    lines = said("status", "tiny-spec").splitlines()
    assert lines[0] == "tiny-spec: finished, 3 of 3 rounds committed"
    final, title = (
        next(i for i, line in enumerate(lines) if line.startswith(w)) for w in ("final ", "ledger of round 3")
    )
    assert final < title
    assert [line.split()[0] for line in lines[-4:-1]] == ["code", "latin", "numbers"]
    assert lines[-1].startswith("while they trained: ")
    assert lines[-1].rstrip().endswith("FLOP/s")
    assert said("status", run).splitlines() == lines, "by name and by folder"


def test_the_score_is_that_of_the_run_s_last_record(run):
    text = said("score", run)
    assert text.startswith("tiny-spec after 3 rounds")
    record = read_records(run / "metrics.jsonl")[-1]
    for source, score in record["scores"].items():
        (line,) = (line.split() for line in text.splitlines() if line.startswith(source))
        assert (line[1], line[3]) == (f"{score['loss']:.4f}", f"{score['bits_per_byte']:.4f}")
    of_one = said("score", run, "--source", "latin").splitlines()
    assert [line for line in text.splitlines() if line.startswith("latin")] == [
        line for line in of_one if line.startswith(SOURCES)
    ]
    assert "did you mean latin" in refused("score", run, "--source", "latn")


def test_text_goes_on_from_the_prompt_and_hangs_on_the_seed(run):
    ask = ("generate", run, "--source", "latin", "--prompt", "lorus ", "--tokens", "20")
    first = said(*ask)
    assert first.startswith("lorus ")
    assert said(*ask) == first
    assert said(*ask, "--seed", "1") != first


def test_without_a_source_the_prompt_chooses_one_and_it_is_told_beside_the_text(run):
    likest = dept_ray("generate", run, "--prompt", "lorus ", "--tokens", "20")
    assert likest.stdout == said("generate", run, "--source", "latin", "--prompt", "lorus ", "--tokens", "20")
    assert "source latin: its unigram model knows the text best (" in likest.stderr
    first = dept_ray("generate", run, "--tokens", "3")
    assert (first.exit_code, bool(first.stdout)) == (0, True)
    assert "source code: the first, for there is no text to choose by" in first.stderr


def test_a_text_is_scored_by_the_source_it_is_like_and_every_source_s_figure_is_told(run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(document("latin", 60), encoding="utf-8")
    told = [line.split() for line in said("score", run, "--text", file).splitlines()]
    rows = {line[0]: line[1:] for line in told if line and line[0] in ("code", "latin", "numbers")}
    assert next(iter(rows)) == "latin"
    assert [len(row) for row in rows.values()] == [4, 1, 1], "only the one that was chosen has a model's figures"
    file.write_text("lorus ZQ", encoding="utf-8")
    told = refused("score", run, "--text", file, "--source", "latin")
    assert told.startswith(f"VocabularyError: --text {file}: the text holds 'Q', 'Z', which source latin never does")
    file.write_text("")
    assert refused("score", run, "--text", file) == "ConfigError: the text to be scored is empty"
    file.write_bytes(b"\xff")
    assert "cannot be read as UTF-8 text" in refused("score", run, "--text", file)


def test_a_run_is_adapted_with_the_paper_s_defaults_and_told_beside_another(run, tmp_path):
    path = tmp_path / "one.toml"
    source = load_job(run.parents[1] / "tiny.toml").sources[0].model_dump(mode="json", exclude_unset=True)
    path.write_text("[[sources]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in source.items()))
    said("adapt", "--local", run, path, "--name", "first")
    job = Run.open(run.parent / "first").job
    assert (job.method, job.inner.lr, job.inner.local_steps, job.rounds.total) == ("std", 1e-2, 4, 1)
    assert (job.init.run, job.init.round, job.init.embedding) == (str(run), 3, "random")
    told = said("adapt", "--local", run, path, "--frozen-body", "--against", run.parent / "first")
    lines = [line.rstrip() for line in told.splitlines()]
    table = lines[lines.index("tiny-spec-adapted: how fast it learnt") :]
    first = Run.open(run.parent / "first").history()
    assert table[-1].split()[0] == "code"
    assert f"{first[-1]['scores']['code']['bits_per_byte']:.4f}" in table[-1]
    assert max(map(len, lines)) <= 80
    message = refused("adapt", "--local", run, path, "--embedding", "own", "--name", "third")
    assert message.startswith('ConfigError: init.embedding = "own"')


def test_a_region_s_labels_have_values(tmp_path):
    result = dept_ray("region", "--mailbox", tmp_path, "--labels", "region=eu,spot")
    assert result.exit_code == 2
    assert "'spot' has no value; write region=eu,market=spot" in result.stderr
