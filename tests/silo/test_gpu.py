"""On a real GPU: a CPU's numbers, room for what was said to fit, one silo of several GPUs. Skipped where none is."""

import dataclasses
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from test_ranks import ranked
from test_silo import first_order, next_order

from dept_ray.config import Job
from dept_ray.messages import SiloUpdate
from dept_ray.rounds.pool import specs_of
from dept_ray.silo.silo import Silo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.filterwarnings("default"),  # what drivers and compilers of any age say is shown, and fails nothing
]

SETTINGS = {"eps": 1e-6, "optimizer_state": "keep", "micro_batch": 2}


def two_rounds(job: Job) -> tuple[SiloUpdate, SiloUpdate, str]:
    """Two answers of the first silo of a job, and what it ran on."""
    with closing(Silo(job, next(iter(specs_of(job).values())))) as silo:
        order = first_order(job, silo)
        first = silo.obey(order)
        return first, silo.obey(next_order(order, first)), str(silo.hardware)


def assert_near(a: SiloUpdate, b: SiloUpdate, losses: float, cosine: float) -> None:
    assert a.loss == pytest.approx(b.loss, rel=losses)
    for source, score in b.scores.items():
        assert a.scores[source].nats == pytest.approx(score.nats, rel=losses)
    for what in ("body", "rows"):
        mine, other = getattr(a, what), getattr(b, what)
        if other is not None:
            assert np.vdot(mine, other) / np.linalg.norm(mine) / np.linalg.norm(other) > cosine


@pytest.mark.parametrize("method", ["glob", "spec-opt"])
@pytest.mark.parametrize(("inner", "losses", "cosine"), [
    ({"precision": "fp32"}, 1e-4, 0.999),
    ({"precision": "bf16"}, 1e-3, 0.99),
    ({"precision": "bf16", "compile": "always"}, 1e-3, 0.99),
    ({"precision": "fp32", "checkpoint_activations": True, "norms_every": 2}, 1e-4, 0.999),
    ({"precision": "fp32", "optimizer": "muon"}, 1e-3, 0.99),
])  # fmt: skip
def test_a_gpu_has_a_cpu_s_numbers(
    tiny: Callable[..., Job], method: str, inner: dict[str, object], losses: float, cosine: float
) -> None:
    gpu = tiny(method, at="gpu", inner={**SETTINGS, **inner}, resources={"num_gpus": 1})
    cpu = tiny(method, at="cpu", inner={**SETTINGS, **inner, "precision": "fp32", "compile": "never"})
    *ours, hardware = two_rounds(gpu)
    *theirs, _ = two_rounds(cpu)
    assert hardware.startswith("cuda")
    assert ("compiled" in hardware) == ("compile" in inner)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, losses, cosine)
        assert (a.peak_flops > 0) == (a.flops > 0 and inner["precision"] == "bf16")


def test_what_was_said_to_fit_fits_and_is_more_than_one(tiny: Callable[..., Job]) -> None:
    wide = {"layers": 4, "width": 512, "heads": 8}
    job = tiny(model=wide, inner={"batch_size": 64, "precision": "bf16", "local_steps": 2}, resources={"num_gpus": 1})
    with closing(Silo(job, next(iter(specs_of(job).values())))) as silo:
        assert silo.hardware.micro_batch == 64, "a tenth of the memory of the smallest of GPUs would do"
        assert silo.obey(first_order(job, silo)).steps == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("shard", ["never", "moments", "all"])
@pytest.mark.parametrize("compile", ["never", "always"])
def test_two_gpus_have_the_numbers_of_one_over_nccl(tiny: Callable[..., Job], shard: str, compile: str) -> None:
    alone = ranked(tiny, 1, "trim", "never", micro_batch=1)
    several = ranked(tiny, 2, "trim", shard, micro_batch=1, compile=compile)
    resources = several.resources.model_copy(update={"num_gpus": 2.0})
    *ours, hardware = two_rounds(several.model_copy(update={"resources": resources}))
    *theirs, _ = two_rounds(alone)
    assert "2 ranks" in hardware
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 1e-4, 0.999)


def test_an_order_on_a_gpu_survives_its_silo(tiny: Callable[..., Job]) -> None:
    """What a snapshot holds leads to where memory would have: to rounding, for sums on a GPU have no order."""
    job = tiny("spec", inner={**SETTINGS, "precision": "fp32"}, resources={"num_gpus": 1})
    spec = next(iter(specs_of(job).values()))
    with closing(Silo(job, spec)) as silo:
        order = dataclasses.replace(first_order(job, silo), score=False)
        second = next_order(order, silo.obey(order))
        went_on = silo.obey(second)
    with closing(Silo(job, spec)) as silo:
        assert_near(silo.obey(second), went_on, 1e-5, 0.9999)
