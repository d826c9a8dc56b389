"""A silo whose model is cut among its ranks is one silo: the numbers of one rank, the same files, failing whole.

Its ranks are processes here, as always: torch has one default process group in each.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_parts import moments_in
from test_ranks import assert_close, assert_same_rounds, kill_rank_1, rank_1_killed_before_batch, ranked, rounds_of
from test_silo import assert_same, first_order, next_order

from dept_ray.config import Job
from dept_ray.errors import ConfigError, SiloError
from dept_ray.rounds.pool import LocalPool, specs_of
from dept_ray.silo.crew import start_processes
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.model import Attention
from dept_ray.silo.score import score_corpus
from dept_ray.silo.silo import Silo

Make = Callable[..., Job]


@contextmanager
def opened(job: Job) -> Iterator[Silo]:
    """The first silo of a job; of those whose model is cut one at a time."""
    with closing(Silo(job, next(iter(specs_of(job).values())), start=start_processes)) as silo:
        yield silo


@pytest.mark.parametrize(("ranks", "method", "inner"), [
    (2, "trim", {"clip": 0.05, "norms_every": 3}),
    (3, "isolated", {"micro_batch": 1, "checkpoint_activations": True}),
])  # fmt: skip
def test_ranks_with_a_shard_of_the_model_equal_one_with_all(tiny: Make, ranks: int, method: str, inner: Any) -> None:
    several, alone = ranked(tiny, ranks, method, "all", **inner), ranked(tiny, 1, method, **inner)
    with opened(several) as ours, opened(alone) as theirs:
        assert_same_rounds(ours, theirs)
        assert ours.score()["code"].nats == pytest.approx(theirs.score()["code"].nats, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler: of torch.jit
def test_compiled_shards_compute_the_same_and_are_compiled_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    from dept_ray.silo import sharded

    passes, first_pass = [], sharded.first_pass
    monkeypatch.setattr(sharded, "first_pass", lambda *told: passes.append(1) or first_pass(*told))
    cut = {"model": {"layers": 2}, "resources": {"ranks": 2, "shard": "all"}}
    inner = {"batch_size": 6, "optimizer_state": "keep", "eps": 1e-6}
    several = tiny("trim", at="several", inner={**inner, "compile": "always"}, **cut)
    alone = tiny("trim", at="alone", inner=inner, model=cut["model"])
    with opened(several) as ours, opened(alone) as theirs:
        assert "compiled" in str(ours.hardware)
        torch._dynamo.reset()  # of what other tests have compiled
        counters.clear()
        assert_same_rounds(ours, theirs)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 3, "attention, MLP and a chunk of the loss: for all blocks, and for the second order too"
        assert len(passes) == 1
        kill_rank_1(ours)
        assert ours.obey(first_order(several, ours)).steps == 4, (
            "ranks that come anew make theirs, and so do the others"
        )
    assert len(passes) == 2


def test_in_bf16_the_shards_compute_what_autocast_computes(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the third digit of a gradient, as two orders of summing do in bf16; and blocks travel in it."""
    several, alone = ranked(tiny, 2, "spec", "all", precision="bf16"), ranked(tiny, 1, "spec", precision="bf16")
    seen, attend = set[torch.dtype](), Attention.forward
    look = lambda self, *more: seen.add(self.qkv.weight.dtype) or attend(self, *more)  # noqa: E731
    with opened(several) as ours, opened(alone) as theirs:
        with monkeypatch.context() as patch:
            patch.setattr(Attention, "forward", look)
            a = ours.obey(dataclasses.replace(first_order(several, ours), score=False))
        b = theirs.obey(first_order(alone, theirs))
    assert seen == {torch.bfloat16}
    assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert a.body is not None
    assert b.body is not None
    cosine = np.vdot(a.body, b.body) / np.linalg.norm(a.body) / np.linalg.norm(b.body)
    assert cosine > 0.999


def test_shards_resume_bit_for_bit_and_files_do_not_tell_of_them(tiny: Make) -> None:
    """Bit for bit by other followers; to rounding by ranks that have all, or a part of the moments."""
    job = ranked(tiny, 2, shard="all")
    with opened(job) as silo:
        order = first_order(job, silo)
        first = silo.obey(order)
        second, cut = next_order(order, first), moments_in(job, first.snapshot)
        went_on = silo.obey(second)
    with opened(job) as silo:
        assert_same(silo.obey(second), went_on)
    for shard in ("never", "moments"):
        other = ranked(tiny, 2, shard=shard)
        assert other.fingerprint == job.fingerprint
        with opened(other) as silo:
            assert_close(silo.obey(second), went_on)  # reads what shards have written
            silo.obey(order)
            whole = moments_in(other, first.snapshot)
        assert {name: v.shape for name, v in cut.items()} == {name: v.shape for name, v in whole.items()}
        for name, moment in whole.items():
            torch.testing.assert_close(cut[name], moment, rtol=1e-4, atol=1e-6)
    with opened(job) as silo:
        assert_close(silo.obey(second), went_on)  # and shards read what was written without them


def test_each_rank_holds_its_shard_while_it_trains_and_nothing_afterwards(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dept_ray.silo.sharded import Sharded

    held: list[dict[int, int]] = []
    stepped: list[str] = []
    gather, release = Sharded.gather, Sharded.release

    def look(self: Sharded) -> None:
        held.append({})
        for shard in self.optimizer.groups:
            stepped.append(shard.name.split(".", 1)[1])
            kept = [moments.get(shard.name, {}) for moments in (self.optimizer.moments, self.optimizer._forgotten)]
            tensors = [shard.stepped, shard.stepped.grad, *(t for moments in kept for t in moments.values() if t.dim())]
            found = [t.untyped_storage() for t in tensors if t is not None]
            held[-1].update({storage._cdata: storage.nbytes() // 4 for storage in found})

    def look_and_gather(self: Sharded, *more: Any) -> None:
        look(self)
        gather(self, *more)

    def release_and_look(self: Sharded) -> None:
        release(self)
        look(self)

    monkeypatch.setattr(Sharded, "gather", look_and_gather)
    monkeypatch.setattr(Sharded, "release", release_and_look)
    job = ranked(tiny, 2, shard="all")
    with opened(job) as silo:
        rounds_of(silo, job)  # the second begins with the moments of the first
        parameters = dict(silo.model.named_parameters())
        assert not any(p.grad is not None for p in parameters.values()), "gradients are the shards' alone"
    assert sorted(stepped) == sorted(4 * [*parameters])
    most = sum(4 * -(-len(p) // 2) * p[0].numel() for p in parameters.values())
    for number, found in enumerate(held):
        if number % 2:
            assert sum(found.values()) == 0
        else:
            assert most * 0.98 < sum(found.values()) <= most, "a half of weights, gradients and both moments"


def test_a_rank_that_is_killed_fails_the_silo_and_the_next_order_succeeds(tiny: Make) -> None:
    job = ranked(tiny, 2, shard="all", local_steps=6)
    with opened(job) as silo:
        order = first_order(job, silo)
        with rank_1_killed_before_batch(silo, 3), pytest.raises(SiloError, match=r"rank 0 of 2 lost another: [A-Z]"):
            silo.obey(order)
        first = silo.obey(order)
        assert first.steps == 6
        kill_rank_1(silo)
        assert silo.obey(next_order(order, first)).steps == 6


def test_a_process_has_one_silo_with_shards(tiny: Make) -> None:
    job = ranked(tiny, 2, "spec", shard="all")
    pool = LocalPool()
    with pytest.raises(ConfigError, match=r'resources\.shard = "all" also for latin.*--local'):
        pool.open(job, job)
    pool.close()
    with ExitStack() as both:
        first, second = (both.enter_context(closing(Silo(job, spec))) for spec in list(specs_of(job).values())[:2])
        first.obey(first_order(job, first))
        with pytest.raises(SiloError, match="one silo whose model is cut, of which this is the second"):
            second.obey(first_order(job, second))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_home_is_the_host_is_scored_by_a_copy(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """To the bit; in bf16 its matrices are half as large."""
    job = ranked(tiny, 1, precision=precision)
    with opened(job) as silo:
        silo.obey(first_order(job, silo))
        expected = silo.score()
        monkeypatch.setattr(Hardware, "home", "elsewhere")
        with silo._learner.on_device() as copy:
            silo.body.zero_()
            assert (
                score_corpus(copy, silo.corpora["code"], silo.vocabulary, 32, silo._rows_scored, silo.hardware)
                == (expected["code"])
            )
            weights = copy.body.blocks[0].attention.qkv.weight
            assert (weights.dtype == torch.bfloat16) == (precision == "bf16")
        assert silo.score() != expected, "a copy of what it is now"


def test_shards_on_gpus_want_to_be_told_how_much_at_once(tiny: Make) -> None:
    with pytest.raises(ConfigError, match=r'"all" and no inner\.micro_batch'):
        tiny(resources={"shard": "all", "num_gpus": 2})
