"""Inner steps are AdamW as asked for, on the whole batch's gradient however it is cut, at the global step's rate."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from dept_ray.config import Job
from dept_ray.jobfile import parse_job
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.inner import Schedule, Trained, cosine, make_optimizer, train_steps
from dept_ray.silo.model import (
    Body,
    Embedding,
    LanguageModel,
    Layout,
    flatten_gradients,
    flatten_parameters,
    initialise,
)

V, B, T = 40, 4, 16


def job_of(**inner: Any) -> Job:
    settings = {
        "batch_size": B,
        "context": T,
        "lr": 1e-2,
        "warmup_steps": 0,
        "local_steps": 4,
        "precision": "fp32",
        **inner,
    }
    return parse_job(
        {"name": "tiny", "sources": [{"kind": "installed", "collection": "docs", "name": "docs"}], "inner": settings,
         "model": {"layers": 1, "width": 16, "heads": 2}, "rounds": {"total": 3}}
    )  # fmt: skip


class Bench:
    """A model, its flat body and its optimizer, as a silo has them."""

    def __init__(self, job: Job, arch: str = "gpt2") -> None:
        self.job = job
        section = job.model.model_copy(update={"arch": arch})
        self.model = LanguageModel(Body(section), Embedding(V, section, T))
        initialise(self.model, torch.Generator().manual_seed(0))
        self.layout = Layout.of(self.model.body)
        self.body = flatten_parameters(self.model.body, self.layout)
        grad = flatten_gradients(self.model.body, self.layout)
        self.optimizer = make_optimizer(job, self.body, self.layout, grad, self.model.embedding)

    def train(self, batches: list[np.ndarray], micro_batch: int = B, **more: Any) -> Trained:
        inner, scheduled = self.job.inner, {k: more.pop(k) for k in [*more] if k in Schedule.__dataclass_fields__}
        schedule = Schedule(
            **{"first_step": 0, "steps": len(batches), "total_steps": self.job.total_steps, "peak": inner.lr,
               "warmup": inner.warmup_steps, "floor": inner.lr_floor} | scheduled
        )  # fmt: skip
        settings: dict[str, Any] = {
            "loss_of": self.model.loss, "schedule": schedule,
            "should_stop": lambda: False, "watch": lambda *args: None,
        }  # fmt: skip
        settings |= more
        hardware = Hardware("cpu", 1, False, False, micro_batch)
        return train_steps(
            self.model, optimizer=self.optimizer, batches=batches, job=self.job, hardware=hardware, **settings
        )

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def rates(self) -> dict[str, float]:
        return {group.name: group.lr for group in self.optimizer.groups}


def some_batches(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, V, (count, B, T + 1)).astype(np.uint16))


# ------------------------------------------------------------------------------------------------ the rate


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [cosine(step, steps=110, warmup=10, peak=2.0, floor=0.1) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)  # half way: the mean of peak and floor
    assert rates[35] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_rate_stays_at_its_floor_after_the_last_step():
    assert cosine(110, steps=110, warmup=10, peak=2.0, floor=0.1) == pytest.approx(0.2)
    assert cosine(10_000, steps=110, warmup=10, peak=2.0, floor=0.0) == 0.0


def test_a_run_shorter_than_its_warm_up_has_rates_too():
    assert [cosine(step, steps=3, warmup=100, peak=1.0, floor=0.1) for step in range(3)] == [0.01, 0.02, 0.03]
    assert cosine(0, steps=1, warmup=0, peak=1.0, floor=0.1) == 1.0


def test_steps_take_the_rate_of_the_global_step():
    bench = Bench(job_of())
    bench.train(some_batches(2), first_step=7)
    assert set(bench.rates().values()) == {cosine(8, steps=12, warmup=0, peak=1e-2, floor=0.1)}


def test_an_embedding_that_is_drawn_anew_has_a_cosine_of_its_own():
    bench = Bench(job_of())
    bench.train(some_batches(1), first_step=8, embedding_period=4)  # the first step of the third period
    now = cosine(8, steps=12, warmup=0, peak=1e-2, floor=0.1)
    assert bench.rates() == {"matrices": now, "vectors": now, "positions": now, "tokens": 1e-2}


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_make_the_step_of_the_whole_batch(micro_batch):
    """eps = 1, so that AdamW's step is nearly the gradient itself, and not its sign alone."""
    whole, cut = Bench(job_of(eps=1.0)), Bench(job_of(eps=1.0))
    start, batches = whole.values(), some_batches(3)
    losses = whole.train(batches).loss, cut.train(batches, micro_batch).loss
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, parameter in cut.values().items():
        torch.testing.assert_close(parameter, whole.values()[name], rtol=1e-5, atol=1e-5)
        if "qkv.bias" not in name:
            assert not torch.equal(parameter, start[name])


def gradient_at_the_step(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    """Norm and parts of what the optimizer is given in one step."""
    bench, seen = Bench(job), {}

    step = bench.optimizer.step

    def look_and_step() -> None:
        seen.update({group.name: group.tensor.grad.clone() for group in bench.optimizer.groups})
        step()

    bench.optimizer.step = look_and_step
    bench.train(some_batches(1))
    return float(torch.cat([grad.flatten() for grad in seen.values()]).norm()), seen


def test_the_gradient_is_that_of_the_mean_loss_over_tokens():
    _, seen = gradient_at_the_step(job_of(clip=1e9))
    bench = Bench(job_of())
    bench.optimizer.zero_grad()
    ids = torch.from_numpy(some_batches(1)[0].astype(np.int64))
    logits = bench.model(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for group in bench.optimizer.groups:
        torch.testing.assert_close(seen[group.name], group.tensor.grad, rtol=1e-5, atol=1e-6)


def test_a_long_gradient_is_cut_to_the_clip_and_a_short_one_is_left_alone():
    free, unclipped = gradient_at_the_step(job_of(clip=1e9))
    short, clipped = gradient_at_the_step(job_of(clip=free / 8))
    just, left = gradient_at_the_step(job_of(clip=free * 1.01))
    assert short == pytest.approx(free / 8, rel=1e-5)
    assert just == free
    for name, grad in unclipped.items():
        torch.testing.assert_close(8 * clipped[name], grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(left[name], grad)


# ------------------------------------------------------------------------------------------------ AdamW

SETTINGS = {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3, "clip": 1e9}


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_four_steps_are_torch_s_adamw_with_the_user_s_settings(arch):
    """Against one optimizer over the model's own tensors, matrices of the body alone decayed."""
    bench, twin = Bench(job_of(**SETTINGS), arch), Bench(job_of(**SETTINGS), arch)
    batches = some_batches(4)
    bench.train(batches)

    named = dict(twin.model.named_parameters())
    decayed = [name for name, parameter in named.items() if name.startswith("body.") and parameter.dim() == 2]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.3},
        {"params": [parameter for name, parameter in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.5, 0.7), eps=1e-3)
    for step, batch in enumerate(batches):
        for group in reference.param_groups:
            group["lr"] = cosine(step, steps=12, warmup=0, peak=1e-2, floor=0.1)
        reference.zero_grad(set_to_none=False)
        ids = torch.from_numpy(batch.astype(np.int64))
        torch.nn.functional.cross_entropy(twin.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        reference.step()
    for name, value in bench.values().items():
        torch.testing.assert_close(value, named[name].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "value"), [("betas", (0.5, 0.7)), ("eps", 1e-3), ("weight_decay", 0.5)])
def test_each_setting_changes_the_result(key, value):
    default, changed = Bench(job_of()), Bench(job_of(**{key: value}))
    for bench in (default, changed):
        bench.train(some_batches(3))
    assert not torch.equal(default.body, changed.body)


def test_decay_touches_the_matrices_of_the_body_alone():
    bench = Bench(job_of(weight_decay=0.5, lr=0.1))
    before = bench.values()
    bench.train(some_batches(1), loss_of=lambda ids, targets: 0 * bench.model.loss(ids, targets))
    for name, after in bench.values().items():
        if name.startswith("body.") and after.dim() == 2:
            torch.testing.assert_close(after, before[name] * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)
        else:
            assert torch.equal(after, before[name]), name


# ------------------------------------------------------------------------------------------------ the round


def test_a_round_tells_steps_tokens_and_its_mean_loss():
    bench, batches = Bench(job_of()), some_batches(3)
    alone = [Bench(job_of()).train(batches[:n]) for n in (1, 2, 3)]
    done = bench.train(batches)
    assert (done.steps, done.tokens) == (3, 3 * B * T)
    each = np.diff([0.0, *(n * trained.loss for n, trained in enumerate(alone, 1))])
    assert done.loss == pytest.approx(each.mean(), rel=1e-6)
    assert each[0] == pytest.approx(math.log(V), rel=0.02)


def test_a_stopped_round_counts_what_was_done_and_makes_one_step_at_least():
    asked = iter([False, True])
    bench, twin = Bench(job_of()), Bench(job_of())
    done = bench.train(some_batches(4), should_stop=lambda: next(asked))
    assert (done.steps, done.tokens) == (2, 2 * B * T)
    assert done == twin.train(some_batches(2))
    assert torch.equal(bench.body, twin.body)

    least = bench.train(some_batches(4), should_stop=lambda: True)
    assert least == twin.train(some_batches(1))
    assert torch.equal(bench.body, twin.body)


def test_what_a_broken_step_left_in_the_gradients_counts_for_nothing():
    clean, dirty = Bench(job_of()), Bench(job_of())
    for parameter in dirty.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad.fill_(1)
    assert clean.train(some_batches(2)).losses == dirty.train(some_batches(2)).losses
    values = dirty.values()
    assert all(torch.equal(value, values[name]) for name, value in clean.values().items())
