"""Moments in parts change where numbers lie, not what they are: same files, same answers, less in each rank."""

import dataclasses
import doctest
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from test_ranks import OpenSilo, Threads, assert_close, assert_same_rounds, ranked, rounds_of, together
from test_silo import assert_same, first_order, next_order

from dept_ray.config import Job
from dept_ray.errors import ConfigError, SiloError
from dept_ray.rounds.pool import specs_of
from dept_ray.silo import hardware as hardware_module
from dept_ray.silo import parts as parts_module
from dept_ray.silo import trainee as trainee_module
from dept_ray.silo.hardware import Hardware, choose_shard
from dept_ray.silo.model import Sizes
from dept_ray.silo.optimizer import AdamW, Group
from dept_ray.silo.parts import (
    clip_gradients,
    divide,
    gather_moments,
    part_of,
    share_parameters,
    spread,
    sum_gradients,
)
from dept_ray.silo.silo import Silo
from dept_ray.silo.snapshot import load_snapshot, silo_folder
from dept_ray.silo.team import Team


@pytest.fixture
def open_silo() -> Iterator[OpenSilo]:
    """The first silo of a job."""
    with ExitStack() as opened:

        def make(job: Job) -> Silo:
            return opened.enter_context(closing(Silo(job, next(iter(specs_of(job).values())), start=Threads)))

        yield make


def moments_in(job: Job, snapshot: str) -> dict[str, torch.Tensor]:
    """What a snapshot of the first silo says of the optimizer."""
    return load_snapshot(silo_folder(job, next(iter(specs_of(job)))) / snapshot)[0]["optimizer"]


# ------------------------------------------------------------------------------------------------ the silo


@pytest.mark.parametrize(("ranks", "method", "inner"), [
    (2, "trim", {"clip": 0.05, "norms_every": 3}), (2, "act", {}), (2, "isolated", {}), (3, "spec", {"micro_batch": 1}),
])  # fmt: skip
def test_ranks_with_a_part_of_the_moments_equal_one_with_all(tiny, open_silo, ranks, method, inner):
    several, alone = ranked(tiny, ranks, method, "moments", **inner), ranked(tiny, 1, method, **inner)
    assert_same_rounds(open_silo(several), open_silo(alone))


def test_parts_resume_bit_for_bit(tiny, open_silo):
    """On another machine, whose followers know nothing: rank 0's snapshot is all there is."""
    job = ranked(tiny, 3, shard="moments")
    silo = open_silo(job)
    order = first_order(job, silo)
    second = next_order(order, silo.obey(order))
    expected = silo.obey(second)
    assert_same(open_silo(job).obey(second), expected)


def test_files_do_not_tell_whether_there_were_parts_and_a_run_may_change(tiny, open_silo):
    job, whole = ranked(tiny, 2, shard="moments"), ranked(tiny, 2, shard="never")
    assert job.fingerprint == whole.fingerprint
    silo = open_silo(job)
    order = first_order(job, silo)
    first = silo.obey(order)
    second, in_parts = next_order(order, first), moments_in(job, first.snapshot)
    went_on = silo.obey(second)
    assert_close(open_silo(whole).obey(second), went_on)  # reads what parts have written
    again = open_silo(whole).obey(order)
    in_one = moments_in(job, again.snapshot)
    assert {name: (v.shape, v.dtype) for name, v in in_parts.items()} == {
        name: (v.shape, v.dtype) for name, v in in_one.items()
    }
    for name, moment in in_one.items():
        torch.testing.assert_close(in_parts[name], moment, rtol=1e-4, atol=1e-6)
    assert_close(open_silo(job).obey(second), went_on)  # and parts read what was written without them


def test_each_rank_holds_its_part_of_the_moments_and_no_more(tiny, open_silo, monkeypatch):
    held: dict[int, dict[str, int]] = {}

    def look_and_gather(team: Team, optimizer: Any) -> None:
        held[team.rank] = {
            f"{group}.{key}": moment.untyped_storage().nbytes() // 4
            for group, moments in optimizer.moments.items()
            for key, moment in moments.items()
            if key != "step"
        }
        gather_moments(team, optimizer)

    monkeypatch.setattr(trainee_module, "gather_moments", look_and_gather)
    job = ranked(tiny, 3, shard="moments")
    silo = open_silo(job)
    rounds_of(silo, job)  # the second begins with the moments of the first
    sizes = {group.name: group.tensor.numel() for group in silo._learner.optimizer.groups}
    assert sorted(held) == [0, 1, 2]
    for rank, moments in held.items():
        assert len(moments) == 2 * len(sizes)
        for name, size in moments.items():
            part = part_of(sizes[name.split(".")[0]], rank, 3)
            assert size == part.stop - part.start


# ------------------------------------------------------------------------------------------------ the step


def test_a_step_in_parts_is_the_step_of_the_whole_also_where_a_rank_has_none() -> None:
    sizes, clip = {"matrices": (5, 3), "positions": (2, 1)}, 0.5

    def optimizer() -> AdamW:
        draw = torch.Generator().manual_seed(0)
        groups = [Group(name, torch.randn(shape, generator=draw), 0.1, lr=0.1) for name, shape in sizes.items()]
        return AdamW(groups, (0.9, 0.95), 1e-3)

    def gradients(rank: int) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(1 + rank)
        return [torch.randn(shape, generator=draw) for shape in sizes.values()]

    whole = optimizer()
    whole.moments["matrices"] = {
        "step": torch.tensor(3.0), "exp_avg": torch.ones(5, 3), "exp_avg_sq": torch.arange(15.0).view(5, 3)
    }  # fmt: skip
    given = {key: moment.clone() for key, moment in whole.moments["matrices"].items()}
    for tensor, *grads in zip(whole.tensors, *(gradients(rank) for rank in range(3)), strict=True):
        tensor.grad = torch.stack(grads).sum(0)
    torch.nn.utils.clip_grad_norm_(whole.tensors, clip)
    whole.step()

    def one(team: Team) -> AdamW:
        mine = optimizer()
        divide(mine.groups, team.rank, 3)
        here = {k: v.clone() if team.rank == 0 else torch.empty(v.shape, device="meta") for k, v in given.items()}
        mine.moments["matrices"] = here
        spread(team, mine, "cpu")
        for tensor, grad in zip(mine.tensors, gradients(team.rank), strict=True):
            tensor.grad = grad
        sum_gradients(team, mine.groups)
        clip_gradients(team, mine.groups, clip)
        mine.step()
        share_parameters(team, mine.groups)
        gather_moments(team, mine)
        return mine

    found = together(3, one)
    for mine in found:
        assert isinstance(mine, AdamW), mine
        for tensor, first, expected in zip(mine.tensors, found[0].tensors, whole.tensors, strict=True):
            assert torch.equal(tensor, first)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    for group, moments in whole.moments.items():
        for key, moment in moments.items():
            torch.testing.assert_close(found[0].moments[group][key], moment, rtol=1e-6, atol=1e-6)


def test_parts_cover_a_vector_once() -> None:
    for size in (0, 1, 2, 7, 12):
        covered = [i for rank in range(3) for i in range(size)[part_of(size, rank, 3)]]
        assert covered == list(range(size))


# ------------------------------------------------------------------------------------------------ who has parts


def test_a_gpu_that_would_be_too_full_has_parts(tiny, monkeypatch):
    job, gpu = tiny(inner={"optimizer": "adamw", "micro_batch": 1}), Hardware("cuda", 1, True, True, 1, ranks=4)
    size = lambda total: Sizes(body=total - 100, tokens=100, positions=0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24_000))
    assert choose_shard(gpu, job, "auto", size(1000)).parts == 1, "18 bytes a parameter are three quarters"
    found = choose_shard(gpu, job, "auto", size(1001))
    assert (found.shard, found.parts, found.state_bytes) == ("moments", 4, 1001 * 10 + 1001 * 8 // 4)
    assert str(found).endswith("compiled, 4 ranks, moments in 4 parts, 1.2e-05 GB a rank")
    assert choose_shard(gpu, job, "auto", size(1500)).shard == "moments", "12 bytes"
    found = choose_shard(gpu, job, "auto", size(1501))
    assert (found.shard, found.parts, found.state_bytes) == ("all", 4, 1501 * 16 // 4 + 100 * 8)
    assert str(found).endswith("compiled, 4 ranks, model in 4 parts, 6.8e-06 GB a rank")
    assert (found.device, found.home) == ("cuda", "cpu")
    with pytest.raises(SiloError, match=r"set inner\.micro_batch"):
        choose_shard(gpu, tiny(inner={"optimizer": "adamw"}), "auto", size(1501))
    assert choose_shard(gpu, job, "never", size(1001)).parts == 1
    assert choose_shard(gpu, job, "all", size(1)).shard == "all"
    alone = dataclasses.replace(gpu, ranks=1)
    assert choose_shard(alone, job, "all", size(1001)) == alone
    assert choose_shard(gpu, tiny(inner={"optimizer": "muon"}), "auto", size(1001)).parts == 1


def test_on_a_cpu_who_wants_parts_must_say_so_and_the_card_tells(tiny, open_silo):
    cards = {shard: open_silo(ranked(tiny, 2, shard=shard)).card().hardware for shard in ("auto", "moments", "all")}
    assert cards["auto"] == "cpu, 1 thread, fp32, 2 ranks"
    assert cards["moments"] == f"{cards['auto']}, moments in 2 parts"
    assert cards["all"] == f"{cards['auto']}, model in 2 parts"


def test_what_cannot_be_is_refused_before_anything_starts(tiny):
    with pytest.raises(ConfigError, match=r"shard.*'auto', 'never', 'moments' or 'all'"):
        tiny(resources={"shard": "sometimes"})
    for shard in ("moments", "all"):
        with pytest.raises(ConfigError, match=rf'resources\.shard = "{shard}": Muon steps whole matrices'):
            tiny(resources={"shard": shard, "ranks": 2}, inner={"optimizer": "muon"})


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(parts_module).failed == 0
    assert doctest.testmod(hardware_module).failed == 0
