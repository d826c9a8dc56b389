"""A silo whose model is cut among its ranks is one silo: the numbers of one rank, the same files, failing whole.

Its ranks are processes here, as always: torch has one default process group in each.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_parts import moments_in
from test_ranks import assert_close, assert_same_rounds, kill_rank_1, rank_1_killed_before_batch, ranked
from test_silo import assert_same, first_order, next_order

from dept_ray.config import Job
from dept_ray.errors import ConfigError, SiloError
from dept_ray.rounds.pool import LocalPool, specs_of
from dept_ray.silo.crew import start_processes
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


def test_in_bf16_the_shards_compute_what_autocast_computes(tiny: Make) -> None:
    """To the third digit of a gradient, as two orders of summing do in bf16."""
    several, alone = ranked(tiny, 2, "spec", "all", precision="bf16"), ranked(tiny, 1, "spec", precision="bf16")
    with opened(several) as ours, opened(alone) as theirs:
        a, b = ours.obey(first_order(several, ours)), theirs.obey(first_order(alone, theirs))
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


def test_each_rank_holds_its_shard_and_no_more(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from dept_ray.silo.sharded import Sharded

    held: dict[int, int] = {}
    stepped: list[str] = []
    gather = Sharded.gather

    def look_and_gather(self: Sharded, *more: Any) -> None:
        for shard in self.optimizer.groups:
            stepped.append(shard.name.split(".", 1)[1])
            tensors = [shard.stepped, shard.stepped.grad, *self.optimizer.moments[shard.name].values()]
            found = [t.untyped_storage() for t in tensors if t is not None and t.dim()]
            held.update({storage.data_ptr(): storage.nbytes() // 4 for storage in found})
        gather(self, *more)

    monkeypatch.setattr(Sharded, "gather", look_and_gather)
    job = ranked(tiny, 2, shard="all")
    with opened(job) as silo:
        silo.obey(first_order(job, silo))
        parameters = dict(silo.model.named_parameters())
    assert sorted(stepped) == sorted(parameters)
    most = sum(4 * -(-len(p) // 2) * p[0].numel() for p in parameters.values())
    assert most * 0.98 < sum(held.values()) <= most, "a half of weights, gradients and both moments"


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
    with pytest.raises(ConfigError, match=r'resources\.shard = "all" for code, latin.*--local'):
        LocalPool().open(job, job)
    with ExitStack() as both:
        first, second = (both.enter_context(closing(Silo(job, spec))) for spec in list(specs_of(job).values())[:2])
        first.obey(first_order(job, first))
        with pytest.raises(SiloError, match="one silo whose model is cut, of which this is the second"):
            second.obey(first_order(job, second))


def test_a_model_whose_home_is_the_host_is_scored_by_a_copy(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ranked(tiny, 1)
    with opened(job) as silo:
        silo.obey(first_order(job, silo))
        expected = silo.score()
        learner = silo._learner
        monkeypatch.setattr(type(learner.hardware), "home", "elsewhere")
        with learner.on_device() as copy:
            assert copy is not silo.model
        assert json.dumps(expected, default=vars) == json.dumps(silo.score(), default=vars)
