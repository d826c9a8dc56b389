"""The life of a run on a cluster: started, watched, stopped, killed, gone on with, left to the cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import until
from rich.console import Console

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.errors import ClusterError, ConfigError, RunError, SourceError, WrongRunError

pytestmark = [pytest.mark.ray]
Make = Callable[..., Job]
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


@pytest.fixture
def started(ray_here: None) -> Iterator[Callable[..., Run]]:
    """`Run.start`, with whatever it started ended afterwards."""
    runs: list[Run] = []

    def start(job: Job, **more: Any) -> Run:
        runs.append(Run.start(job, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def test_a_run_ends_with_scores_and_leaves_its_records(tiny: Make, started: Callable[..., Run]) -> None:
    job = tiny("trim")
    run = started(job)
    records = run.follow(QUIET)
    assert [r["event"] for r in records] == ["round"] * 3 + ["scores"]
    assert run.status().phase == "finished"
    again = Run.open(run.folder)
    assert [r["round"] for r in again.history()] == [1, 2, 3, 3]
    assert again.status().phase == "finished"
    assert list((run.folder / "tensorboard").glob("events.*"))


def test_a_stopped_run_goes_on_from_its_last_commit(tiny: Make, started: Callable[..., Run]) -> None:
    job = tiny("spec", rounds={"total": 40})
    run = started(job)
    while run.status().round < 1:
        time.sleep(0.02)
    run.stop()
    assert [r["event"] for r in run.follow(QUIET)][-1] == "round"
    stopped = run.status()
    assert stopped.phase == "stopped"
    assert 1 <= stopped.round < 40
    run.kill()
    records = started(job).follow(QUIET)
    assert [r["round"] for r in records if r["event"] == "round"] == list(range(1, 41))


def test_a_run_in_progress_answers_and_is_not_started_twice(tiny: Make, started: Callable[..., Run]) -> None:
    job = tiny("spec", at="twice", inner={"local_steps": 300}, rounds={"total": 50})
    started(job)
    seen = Run.attach(job_folder(job))
    assert seen.status().rounds == 50
    with pytest.raises((RunError, ClusterError), match="is in progress"):
        Run.start(job)


def test_a_killed_coordinator_comes_back_by_itself_and_loses_no_round(tiny: Make, started: Callable[..., Run]) -> None:
    expected = [
        r["loss"] for r in started(tiny("spec", at="whole", name="whole", rounds={"total": 6})).follow(QUIET)[:6]
    ]
    run = started(tiny("spec", at="broken", name="broken", rounds={"total": 6}))
    while run.status().round < 2:
        time.sleep(0.02)
    os.kill(run.status().pid, signal.SIGKILL)
    records = run.follow(QUIET)
    assert [r["round"] for r in records if r["event"] == "round"] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records if r["event"] == "round"] == expected


def test_a_detached_run_ends_its_own_process_when_it_is_over(tiny: Make, ray_here: None) -> None:
    from dept_ray.on_ray.launch import Coordinator

    job = tiny("spec", name="detached")
    run = Run.start(job, detach=True)
    assert [r["event"] for r in run.follow(QUIET)] == ["round"] * 3 + ["scores"]
    until(lambda: Coordinator.find(job.name) is None)
    assert run.status().phase == "finished", "who asks the coordinator that has left is told by the folder"


def test_hands_on_a_live_run(tiny: Make, started: Callable[..., Run], tmp_path: Path) -> None:
    """Pause, step, set, drop, return and add, from another handle than the one that started it."""
    job = tiny("spec-opt", name="live", rounds={"total": 1000})
    started(job)
    run = Run.attach(job_folder(job))
    run.pause()
    until(lambda: run.status().phase == "paused")
    held = run.status().round
    run.set("outer.lr", 0.5)
    run.set("inner.local_steps", 6)
    run.drop("code")
    with pytest.raises(ConfigError, match=r"model\.width cannot be changed in a run"):
        run.set("model.width", 64)
    with pytest.raises(ConfigError, match='no silo "klingon"'):
        run.drop("klingon")
    run.step(2)
    until(lambda: run.status().round == held + 2 and run.status().phase == "paused")
    two = [r for r in run.history() if r["event"] == "round"][-2:]
    assert [sorted(r["silos"]) for r in two] == [["latin", "numbers"]] * 2
    assert {s["steps"] for r in two for s in r["silos"].values()} == {6}
    assert two[-1]["away"] == {"code": "dropped"}

    (tmp_path / "new.txt").write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(40)))
    (tmp_path / "old.txt").write_text("".join(f"{a} minus {b} is {a - b}\n" for a in range(20) for b in range(9)))
    texts = {"paths": str(tmp_path / "new.txt"), "validation_paths": str(tmp_path / "old.txt")}
    run.add({"add": {"name": "sums", "kind": "files", **texts}})
    run.bring_back("code")
    run.resume()
    until(lambda: any("sums" in r["silos"] for r in run.history() if r["event"] == "round"))
    run.pause()
    until(lambda: run.status().phase == "paused")
    run.set("rounds.total", run.status().round + 2)
    run.resume()
    until(lambda: run.status().over)
    assert run.status().phase == "finished"
    records = run.history()
    assert records[-1]["event"] == "scores"
    assert sorted(records[-1]["scores"]) == ["code", "latin", "numbers", "sums"]
    changes = [r["change"] for r in records if r["event"] == "change"]
    assert [next(iter(change)) for change in changes] == ["set", "set", "drop", "add", "return", "set"]


def test_waiting_ends_when_the_run_is_held_and_an_interrupt_ends_only_the_waiting(
    tiny: Make, started: Callable[..., Run]
) -> None:
    run = started(tiny("spec", name="waited", rounds={"total": 100_000}))
    run.step(2)
    assert [r["round"] for r in run.wait(QUIET)] == [1, 2]
    assert run.status().phase == "paused"
    run.step()
    assert [r["round"] for r in run.wait(QUIET)] == [3], "what was told before is not told again"
    run.resume()
    for watching in (run.wait, run.follow):
        # Python drops an interrupt that comes while it collects garbage: who presses Ctrl-C presses it again.
        presses = [threading.Timer(s, os.kill, (os.getpid(), signal.SIGINT)) for s in (1, 30, 60)]
        for press in presses:
            press.start()
        with pytest.raises(KeyboardInterrupt):
            watching(QUIET)
        for press in presses:
            press.cancel()
        here = run.status().round
        until(lambda here=here: run.status().round > here)
    run.pause()
    assert run.wait(QUIET)[-1]["round"] == run.status().round == len(run.history())


def test_answers_come_at_once_while_silos_train(tiny: Make, started: Callable[..., Run]) -> None:
    run = started(tiny("spec", name="busy", inner={"local_steps": 2000}, rounds={"total": 50}))
    until(lambda: training(run))
    asks: dict[str, Callable[[], Any]] = {
        "status": run.status, "set": lambda: run.set("outer.lr", 0.9), "pause": run.pause, "resume": run.resume,
    }  # fmt: skip
    for name, ask in asks.items():
        took = []
        for _ in range(50):
            began = time.perf_counter()
            ask()
            took.append(time.perf_counter() - began)
        print(f"{name}: median {sorted(took)[25] * 1e3:.1f} ms, worst {max(took) * 1e3:.1f} ms")
    kept = run.checkpoint(now=True)
    until(lambda: (kept / "kept").exists())
    (record,) = (r for r in run.history() if r["event"] == "round" and r["round"] == int(kept.name))
    assert all(0 < silo["steps"] < 2000 for silo in record["silos"].values())


def training(run: Run) -> bool:
    """Whether a silo of the run trains now."""
    return any(silo.doing in ("loading", "scoring", "training", "saving") for silo in run.status().silos.values())


def test_a_run_that_fails_says_why(tiny: Make, started: Callable[..., Run]) -> None:
    run = started(tiny("spec", name="too-big", inner={"batch_size": 4096}))
    with pytest.raises(RunError, match="fewer than one batch"):
        run.follow(QUIET)


def test_what_is_wrong_is_said_before_anything_is_spent(tiny: Make, ray_here: None, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"asks for resources\.num_gpus = 2.*more than 0"):
        Run.start(tiny("spec", name="gpus", resources={"num_gpus": 2}))
    with pytest.raises(ClusterError, match=r"ask for 9 of resources\.num_cpus, but the cluster has 4"):
        Run.start(tiny("spec", name="cpus", resources={"num_cpus": 3}))
    with pytest.raises(ClusterError, match=r"labels = {'region': 'mars'}, but no node"):
        Run.start(tiny("spec", name="labels", resources={"labels": {"region": "mars"}}))
    job = tiny("spec", name="mine", at="mine")
    run = Run.start(job)
    run.follow(QUIET)
    run.kill()
    with pytest.raises(WrongRunError, match=r"inner\.lr: 0\.01 there, 0\.5 here"):
        Run.start(tiny("spec", name="mine", at="mine", inner={"lr": 0.5}))
    missing = [{"name": "a", "kind": "files", "paths": str(tmp_path / "none" / "*.txt")}]
    with pytest.raises(SourceError, match=r"none/\*\.txt"):
        Run.start(tiny("spec", name="missing", at="missing", sources=missing))


def test_no_cluster_at_an_address_is_said_within_seconds(tiny: Make) -> None:
    done = cli("train", job_file(tiny("spec", name="nowhere")), "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no Ray cluster answers at address '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_after_the_commit_and_leaves_nothing_running(tiny: Make) -> None:
    job = tiny("spec", name="interrupted", inner={"local_steps": 100}, rounds={"total": 500})
    child = subprocess.Popen(
        [sys.executable, "-m", "dept_ray", "train", job_file(job)],
        stdout=subprocess.PIPE, text=True, start_new_session=True, env=CLEAN,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("round    2"):
            break
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the command and to all that it started
    rest = child.stdout.read()
    assert child.wait() == 0
    assert "stopping after this round is committed" in rest
    assert "Traceback" not in rest
    assert 2 <= Run.open(job_folder(job)).status().round < 500
    until(lambda: not subprocess.run(["pgrep", "-s", str(child.pid)], capture_output=True).stdout)


CLEAN = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dept_ray", *args], capture_output=True, text=True, env=CLEAN, timeout=600
    )


def job_folder(job: Job) -> Path:
    """The run folder of a job."""
    return Path(job.folder) / "runs" / job.name


def job_file(job: Job) -> str:
    """The job as a TOML file."""
    path = Path(job.folder) / f"{job.name}.toml"
    lines, tables = [], []
    for key, value in job.model_dump(mode="json", exclude_none=True).items():
        if key == "sources":
            tables += ["[[sources]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in s.items()) for s in value]
        elif isinstance(value, dict):
            tables.append(f"[{key}]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in value.items()))
        else:
            lines.append(f"{key} = {toml(value)}\n")
    path.write_text("".join(lines) + "\n".join(tables))
    return str(path)


def toml(value: Any) -> str:
    """A TOML literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return (
        str(value).lower() if isinstance(value, bool) else repr(value) if not isinstance(value, str) else f'"{value}"'
    )
