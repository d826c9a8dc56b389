"""Norms are measured where asked for, are those of the parameters, and change no number of the run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ready_job

from dept_ray.config import Job
from dept_ray.in_process import train_here
from dept_ray.metrics import Record, read_records
from dept_ray.rounds.folder import last_round, load_round, run_folder
from dept_ray.sections import ModelSection
from dept_ray.silo.model import Body, Embedding, LanguageModel, initialise
from dept_ray.silo.norms import block_norms
from dept_ray.study.report import report_on
from dept_ray.study.story import Story


@pytest.fixture(scope="module")
def measured(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of TRIM that measured at every third step; to be read only."""
    job = ready_job(prepared, tmp_path_factory.mktemp("norms"), "trim", inner={"norms_every": 3}, rounds={"keep": 9})
    train_here(job, lambda record: None)
    return job


def rounds(job: Job) -> list[Record]:
    return [r for r in read_records(run_folder(job) / "metrics.jsonl") if r["event"] == "round"]


def test_norms_are_those_of_the_global_steps_asked_for(measured: Job) -> None:
    found = [record["silos"]["latin"]["norms"] for record in rounds(measured)]
    assert [norms["step"] for norms in found] == [[0, 3], [6], [9]]
    assert all(len(norms[what]) == len(norms["step"]) for norms in found for what in norms)


def test_the_body_s_norm_is_that_of_what_was_sent(measured: Job) -> None:
    state, _ = load_round(run_folder(measured), last_round(run_folder(measured)) - 1)  # of the order at step 8
    assert state.body is not None
    (near,) = rounds(measured)[2]["silos"]["latin"]["norms"]["body"]  # a step later
    assert near == pytest.approx(float(state.body.norm()), rel=0.05)


def test_measuring_changes_no_number(measured: Job, tiny: Callable[..., Job]) -> None:
    plain = tiny("trim")
    assert plain.fingerprint == measured.fingerprint, "it may be turned on in a run that goes on"
    train_here(plain, lambda record: None)
    assert [r["loss"] for r in rounds(plain)] == [r["loss"] for r in rounds(measured)]
    assert not any("norms" in silo for record in rounds(plain) for silo in record["silos"].values())


def test_a_block_that_adds_nothing_leaves_the_norm_of_its_input() -> None:
    section = ModelSection(layers=2, width=16, heads=2)
    model = LanguageModel(Body(section), Embedding(40, section, 8))
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.body.blocks:
            block.attention.out.weight.zero_()  # pyright: ignore
            block.mlp.down.weight.zero_()  # pyright: ignore
    ids = torch.arange(16).reshape(2, 8)
    expected = model.embedding(ids).norm(dim=-1).mean()
    torch.testing.assert_close(block_norms(model, ids), expected.expand(2))
    assert not any(block._forward_hooks for block in model.body.blocks), "nothing stays behind"


def test_the_report_shows_them_where_they_are(measured: Job) -> None:
    records = tuple(read_records(run_folder(measured) / "metrics.jsonl"))
    assert "How large parameters and activations grow" in report_on([Story("told", measured, records)])
    without = [{**r, "silos": {}} if "silos" in r else r for r in records]
    assert "How large" not in report_on([Story("told", measured, tuple(without))])
