"""The coordinator is killed at every step of a commit, comes back by itself, and nothing is lost or done twice."""

import os
from pathlib import Path

import pytest
import torch
from dying import STEPS, coordinator_that_dies
from faulty_silo import reads_of
from lives import Ordeal, relive
from nodes import until
from ordeals import compare, lost_of, smallest
from rich.console import Console

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.rounds.folder import load_round
from dept_ray.rounds.store import RunStore

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


def start(job: Job, plan: dict[int, str], patch: pytest.MonkeyPatch, pace_s: float = 0.0) -> Run:
    """A run whose coordinator is killed as planned."""
    import dying
    import faulty_silo
    import ray.cloudpickle

    from dept_ray.on_ray import launch

    for module in (dying, faulty_silo):
        ray.cloudpickle.register_pickle_by_value(module)
    patch.setattr(launch, "CoordinatorActor", coordinator_that_dies(plan, pace_s))
    return Run.start(job)


def ordeal_of(run: Run, job: Job) -> Ordeal:
    """What became of a run that is over."""
    round = RunStore(job).rounds()[-1]
    state, _ = load_round(run.folder, round)
    records = run.history()
    return Ordeal(job, state, records, lost_of(records), reads_of(Path(job.folder) / "notes"), 1, [], [])


def test_killed_at_each_step_of_a_commit_it_comes_back_by_itself(prepared, tmp_path, monkeypatch):
    overrides = {"rounds": {"total": len(STEPS) + 1}, "inner": {"optimizer_state": "keep"}}
    job = smallest(prepared, tmp_path / "a", "spec-opt", **overrides)
    run = start(job, dict(enumerate(STEPS)), monkeypatch)
    run.pause()
    run.set("inner.lr", 3e-3)
    run.resume()
    run.follow(QUIET)
    run.kill()
    claims = sorted(path.name for path in (tmp_path / "a" / "notes").glob("claim-*"))
    assert claims == [f"claim-coordinator-{round}" for round in range(len(STEPS))]  # it did die each time
    assert (run.folder / "lives").read_text() == str(1 + len(STEPS))
    ordeal = ordeal_of(run, job)
    assert ordeal.state.changes == ({"set": "inner.lr", "to": 3e-3},)
    reference = relive(ordeal, smallest(prepared, tmp_path / "b", "spec-opt", **overrides), monkeypatch)
    compare(ordeal, reference)
    assert torch.equal(ordeal.state.body, reference.state.body)
    assert all(record["refused"] == {} for record in ordeal.rounds)


def test_it_comes_back_held_if_it_was_held(prepared, tmp_path, monkeypatch):
    """And with what was asked of it since, though no round has heard it."""
    import signal

    job = smallest(prepared, tmp_path, "spec", rounds={"total": 50})
    run = start(job, {}, monkeypatch)
    run.step(2)
    until(lambda: run.status().phase == "paused")
    assert run.status().round == 2
    kept = run.checkpoint()
    run.set("rounds.total", 4)
    run.drop("latin")
    os.kill(run.status().pid, signal.SIGKILL)
    until(lambda: run.status().phase == "paused")
    assert run.status().round == 2
    run.resume()
    records = run.follow(QUIET)
    run.kill()
    assert [sorted(r["silos"]) for r in records if r["event"] == "round"][2:] == [["code", "numbers"]] * 2
    assert [next(iter(r["change"])) for r in records if r["event"] == "change"] == ["set", "drop"]
    assert RunStore(job).rounds() == [2, 3, 4]
    assert kept == run.folder / "rounds" / "000002"
    assert (kept / "kept").exists()


def test_a_checkpoint_promised_for_the_round_in_progress_is_that_round_s(prepared, tmp_path, monkeypatch):
    """Though the coordinator dies before its commit."""
    import signal

    job = smallest(prepared, tmp_path, "spec", inner={"local_steps": 100}, rounds={"total": 6})
    run = start(job, {}, monkeypatch, pace_s=0.05)
    until(lambda: run.status().round >= 1 and any(s.doing == "training" for s in run.status().silos.values()))
    kept = run.checkpoint()
    os.kill(run.status().pid, signal.SIGKILL)
    until(lambda: kept.exists() or run.status().over)
    run.set("inner.local_steps", 2)
    run.follow(QUIET)
    run.kill()
    assert (kept / "kept").exists()
    assert RunStore(job).rounds() == sorted({int(kept.name), 5, 6})
