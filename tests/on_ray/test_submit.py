"""Runs as jobs: a head with dashboard and token on loopback, whose own `dept_ray` cannot be imported.

Everything is done by commands in processes of their own, as a person does it from a machine that reaches a cluster's
dashboard and nothing else; what a run left is read from its folder.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import REPOSITORY, Head, head_in
from nodes import until
from proxy import through
from test_cli import write_job

from dept_ray.errors import ConfigError
from dept_ray.metrics import read_records
from dept_ray.on_ray.jobs import check_paths

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with head_in(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def short(head: Head, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A job of two rounds that was submitted and followed: its folder, and what was said."""
    folder = tmp_path_factory.mktemp("jobs")
    return folder, head.submit(write_job(folder, rounds={"total": 2}))


# ------------------------------------------------------------------------------------------------ without a cluster
def test_paths_that_a_cluster_would_look_for_elsewhere_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_job(tmp_path)
    check_paths(file)
    text = file.read_text()
    file.write_text(text.replace(str(tmp_path / "text"), "text"))
    with pytest.raises(ConfigError, match=r"(?s)sources\.code\.paths = 'text/code/.*sources\.latin\.validation_paths"):
        check_paths(file)
    file.write_text(text.replace(f'folder = "{tmp_path}"', ""))
    with pytest.raises(ConfigError, match=r"folder = '\.'\n.*--folder"):
        check_paths(file)
    check_paths(file, "/mnt/dept")
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path)
    file.write_text(text + '\n[regions]\nmailbox = "letters"\n[init]\nrun = "before"\n')
    with pytest.raises(ConfigError, match=r"(?s)regions\.mailbox = 'letters'.*init\.run = 'before'"):
        check_paths(file)


# ------------------------------------------------------------------------------------------------ on one
def test_a_job_is_followed_to_its_scores_on_a_cluster_without_the_package(
    head: Head, short: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, said = short
    assert said.returncode == 0, said.stdout + said.stderr
    lines = said.stdout.splitlines()
    assert lines[0].startswith("submitted as tiny-spec-")
    assert rounds_in(lines) == ["1", "2"]
    assert any(line.startswith("tiny-spec, spec, after 2 rounds") for line in lines)
    events = [record["event"] for record in read_records(folder / "runs" / "tiny-spec" / "metrics.jsonl")]
    assert events == ["round", "round", "scores"]
    left = head.left()
    assert not left["actors"]
    assert left["free"] == left["all"]


def test_ray_s_own_command_does_the_same_and_a_folder_that_ends_with_the_job_is_refused(
    head: Head, short: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = short
    file = write_job(folder, name="by-hand", rounds={"total": 1})
    train = ("python", "-m", "dept_ray", "train", file)
    words = ("job", "submit", "--address", head.url, "--working-dir", ".", "--", *train)
    refused = head.run("ray.scripts.scripts", *words, "--folder", ".", RAY_AUTH_MODE="token")
    assert refused.returncode != 0
    assert "working directory, which ends with the job" in " ".join(refused.stdout.split())
    done = head.run("ray.scripts.scripts", *words, RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by-hand, spec, after 1 rounds" in done.stdout


def test_a_token_is_asked_for_in_plain_words(head: Head, tmp_path: Path) -> None:
    file = write_job(tmp_path)
    none = head.submit(file, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"), HOME=str(tmp_path))
    wrong = head.submit(file, RAY_AUTH_TOKEN="b2" * 32)
    for refused in (none, wrong):
        assert refused.returncode == 1
        assert "asks for its token" in refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_whoever_joins_the_cluster_shows_it_its_token(head: Head, tmp_path: Path) -> None:
    """By HOST:PORT, where Ray itself shows none; as who steers a run from another terminal does."""

    def join(**env: str) -> subprocess.CompletedProcess[str]:
        code = (
            f"from dept_ray.on_ray.cluster import connect; connect('{head.gcs}'); import ray; print(len(ray.nodes()))"
        )
        return subprocess.run(
            [sys.executable, "-c", code], env=head.env | env, capture_output=True, text=True, timeout=120
        )

    joined = join()
    assert (joined.returncode, joined.stdout) == (0, "1\n"), joined.stderr
    for env, words in (
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}, "and there is none here"),
        ({"RAY_AUTH_TOKEN": "b2" * 32}, "asks for another token than ours"),
    ):
        refused = join(**env)
        assert refused.returncode == 1
        assert f"ClusterError: the Ray cluster at address '{head.gcs}' " in refused.stderr
        assert words in refused.stderr


def test_a_job_outlives_its_watchers_and_a_cancelled_one_leaves_nothing(
    head: Head, short: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = short
    file = write_job(folder, name="long", rounds={"total": 5000, "score_every": 0}, resources={"num_cpus": 0.5})
    detached = head.submit(file, "--detach")
    assert detached.returncode == 0, detached.stderr
    job = detached.stdout.splitlines()[0].removeprefix("submitted as ")

    with through(int(head.url.rpartition(":")[2])) as proxy:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "dept_ray", "submit", "--attach", job, "--address", proxy.url],
            env=head.env | {"PYTHONUNBUFFERED": "1"}, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.extend(watcher.stdout or ()), daemon=True)
        reading.start()
        until(lambda: bool(rounds_in(said)), 120)
        proxy.cut()
        until(lambda: any(line.startswith("connection lost") for line in said), 30)
        before = len(rounds_in(said))
        proxy.mend()
        until(lambda: len(rounds_in(said)) > before, 60)
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(30) == 0
        reading.join(10)
    seen = rounds_in(said)
    assert seen == [str(number) for number in range(1, len(seen) + 1)], "none is missing, none comes twice"
    assert any(f"--cancel {job}" in line for line in said), "it says how to go on"
    metrics = folder / "runs" / "long" / "metrics.jsonl"
    committed = len(read_records(metrics))
    until(lambda: len(read_records(metrics)) > committed, 30)
    held = head.left(times=1)
    assert sorted(name.rpartition(".")[2] for name in held["actors"]) == ["CoordinatorActor", *["SiloActor"] * 3]
    until(lambda: head.left(times=1)["free"] == held["all"] - 1.5, 60)  # whenever no text is being read

    cancelled = head.submit("--cancel", job)
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    left = head.left()
    assert not left["actors"]
    assert left["free"] == left["all"]
    committed = len(read_records(metrics))
    assert head.submit("--cancel", job).stdout == "it was over already\n"
    assert len(read_records(metrics)) == committed
    after = head.submit("--attach", job)
    assert after.returncode == 1
    assert "was cancelled" in after.stderr
    assert rounds_in(after.stdout.splitlines())[:2] == ["1", "2"]
    assert "the cluster has no job" in head.submit("--attach", "nobody").stderr


def rounds_in(lines: list[str]) -> list[str]:
    """Numbers of the rounds that a log tells of."""
    return [line.split()[1] for line in lines if line.startswith("round ")]
