"""A run that was stopped, killed or set back goes on as if nothing had happened: the same bits, records and files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import run
from ordeals import timeless
from test_train import RecordingPool

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.methods import METHODS
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing

OUTER = {"preset": "nesterov", "rows_lr": 0.9, "rows_momentum": 0.5}
TWO_OF_THREE = {"rounds": {"total": 4, "choose": 2}}
KEPT = {"inner": {"optimizer_state": "keep"}, "outer": OUTER}
RESUMES = [
    *(pytest.param(name, {}, id=name) for name in METHOD_NAMES),
    *(pytest.param(name, TWO_OF_THREE, id=f"{name}, 2 of 3 silos") for name in ("trim", "isolated")),
    *(
        pytest.param(name, TWO_OF_THREE | KEPT, id=f"{name}, 2 of 3 silos, moments kept, nesterov")
        for name in METHOD_NAMES
        if METHODS[name].share_body
    ),
    pytest.param("spec", {"model": {"arch": "llama"}, "inner": {"precision": "bf16"}}, id="spec, llama, bf16"),
]


@pytest.mark.parametrize(("method", "overrides"), RESUMES)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tiny, method, overrides):
    rounds = {"total": 2, **overrides.get("rounds", {})}
    changed = {**overrides, "inner": {"local_steps": 2, **overrides.get("inner", {})}, "rounds": rounds}
    whole, halves = tiny(method, at="whole", **changed), tiny(method, at="halves", **changed)
    state, records = run(whole)
    half, half_records = run(halves, stop_after=rounds["total"] // 2)
    assert [record["event"] for record in half_records] == ["round"] * half.round == ["round"] * (rounds["total"] // 2)
    resumed, resumed_records = run(halves)
    assert resumed.silos == state.silos
    assert sorted(resumed.tensors) == sorted(state.tensors)
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert timeless(resumed_records) == timeless(records)
    assert files_of(halves) == files_of(whole)


def files_of(job: Job) -> dict[str, Any]:
    """All that a run keeps of rounds and silos: bytes, and manifests without clock readings."""
    folder, found = Path(job.folder), {}
    for path in sorted([*folder.glob("silos/**/*"), *folder.glob("runs/*/rounds/**/*")]):
        if path.is_file():
            manifest = path.name == "manifest.json"
            found[str(path.relative_to(folder))] = (
                timeless(json.loads(path.read_text())) if manifest else path.read_bytes()
            )
    assert any("silos/" in name for name in found)
    return found


def test_a_run_killed_between_a_silo_s_snapshot_and_the_manifest_makes_the_round_again(tiny):
    """The silos ran ahead of the fact: they go back to the snapshots that the manifest names."""

    class Killed(Exception):
        pass

    class KilledPool(LocalPool):
        def run_round(
            self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
        ) -> dict[str, SiloUpdate | Exception]:
            answers = super().run_round(orders, deadline, meanwhile)
            if next(iter(orders.values())).round == 1:
                raise Killed
            return answers

    inner = {"optimizer_state": "keep"}
    whole, halves = tiny("spec", at="whole", inner=inner), tiny("spec", at="halves", inner=inner)
    state, records = run(whole)
    with pytest.raises(Killed):
        run(halves, pool=KilledPool())
    resumed, resumed_records = run(halves)
    assert torch.equal(resumed.body, state.body)
    assert timeless(resumed_records) == timeless(records)
    assert files_of(halves) == files_of(whole)


@pytest.mark.parametrize("method", ["spec", "std"])
def test_a_run_that_went_back_a_round_by_hand_makes_it_again(tiny, method):
    state, records = run(job := tiny(method))
    before = files_of(job)
    shutil.rmtree(Path(job.folder) / "runs" / job.name / "rounds" / "000003")
    resumed, resumed_records = run(job)
    assert resumed.silos == state.silos
    assert timeless(resumed_records) == timeless(records)
    after = files_of(job)
    assert all(after[name] == before[name] for name in after if "000003" in name or "000002-0-0" in name)


def test_a_finished_run_only_scores_again(tiny):
    job = tiny("spec")
    _, records = run(job)
    pool = RecordingPool()
    _, again = run(job, pool=pool)
    assert timeless(again) == timeless(records)
    assert {order.steps for order in pool.orders} == {0}
