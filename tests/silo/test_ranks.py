"""A silo of several ranks is one silo: the same numbers to rounding, one set of bits on all ranks, failing whole."""

import dataclasses
import doctest
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_silo import assert_same, first_order, next_order, stop_before_batch

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder, SiloSpec
from dept_ray.rounds.pool import specs_of
from dept_ray.silo import crew as crew_module
from dept_ray.silo import team as team_module
from dept_ray.silo.crew import Crew, start_processes
from dept_ray.silo.follower import follow
from dept_ray.silo.rank import Rank
from dept_ray.silo.silo import Silo
from dept_ray.silo.team import Team, join, new_store, open_store

OpenSilo = Callable[..., Silo]


class Threads:
    """Followers in this process: the same code, without the seconds that a process takes to import torch."""

    def __init__(self, port: int, spec: SiloSpec) -> None:
        self.threads = [
            threading.Thread(target=follow, args=(port, rank), daemon=True) for rank in range(1, spec.ranks)
        ]
        for thread in self.threads:
            thread.start()

    def gone(self) -> bool:
        return not all(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        """They end by themselves as soon as rank 0 lets the store go."""


@pytest.fixture
def open_silo() -> Iterator[OpenSilo]:
    """The first silo of a job."""
    opened: list[Silo] = []

    def make(job: Job, start: Callable[[int, SiloSpec], Crew] = Threads) -> Silo:
        opened.append(Silo(job, next(iter(specs_of(job).values())), start=start))
        return opened[-1]

    yield make
    for silo in opened:
        silo.close()


def ranked(tiny: Callable[..., Job], ranks: int, method: str = "trim", shard: str = "auto", **inner: Any) -> Job:
    # The bias of keys has a gradient of rounding errors alone, which AdamW would scale up to steps of full size.
    settings = {"batch_size": 6, "optimizer_state": "keep", "eps": 1e-6, **inner}
    return tiny(method, at=f"{method}-{ranks}", inner=settings, resources={"ranks": ranks, "shard": shard})


def rounds_of(silo: Silo, job: Job, count: int = 2) -> list[Any]:
    """Updates of successive rounds."""
    updates, order = [], first_order(job, silo)
    for _ in range(count):
        updates.append(silo.obey(order))
        order = next_order(order, updates[-1])
    return updates


def assert_same_rounds(ours: Silo, theirs: Silo) -> None:
    """Two rounds of two silos that add in different orders; `activation` is of rank 0's own rows."""
    for a, b in zip(rounds_of(ours, ours.job), rounds_of(theirs, theirs.job), strict=True):
        assert_close(a, b)
        for what in b.norms.keys() - {"activation"}:
            assert a.norms[what] == pytest.approx(b.norms[what], rel=1e-5)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def assert_close(a: Any, b: Any) -> None:
    """Two answers to the same order, by silos that add in different orders."""
    assert (a.steps, a.tokens, a.position, a.snapshot) == (b.steps, b.tokens, b.position, b.snapshot)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for what in ("body", "rows"):
        left, right = getattr(a, what), getattr(b, what)
        assert (left is None) == (right is None)
        if left is not None:
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "method", "inner"), [
    (2, "trim", {}), (2, "act", {}), (3, "spec", {"micro_batch": 1}),
])  # fmt: skip
def test_several_ranks_equal_one_with_the_same_batch(tiny, open_silo, ranks, method, inner):
    several, alone = ranked(tiny, ranks, method, **inner), ranked(tiny, 1, method, **inner)
    assert_same_rounds(open_silo(several), open_silo(alone))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_resume_bit_for_bit(tiny, open_silo, optimizer):
    """On another machine, whose followers know nothing: rank 0's snapshot is all there is."""
    job = ranked(tiny, 2, optimizer=optimizer)
    silo = open_silo(job)
    order = first_order(job, silo)
    second = next_order(order, silo.obey(order))
    expected = silo.obey(second)
    assert_same(open_silo(job).obey(second), expected)


def test_who_is_asked_to_stop_stops_with_all_its_ranks(tiny, open_silo):
    job = ranked(tiny, 2)
    silo, short = open_silo(job), open_silo(job)
    order = first_order(job, silo)
    stop_before_batch(silo, 2, round=0, attempt=0)
    update = silo.obey(order)
    assert (update.steps, update.tokens) == (2, 2 * 6 * 32)
    assert_same(update, short.obey(dataclasses.replace(order, steps=2)))
    assert silo.obey(next_order(order, update)).steps == 4


def test_a_rank_that_fails_says_why_and_the_next_order_succeeds(tiny, open_silo, monkeypatch):
    job = ranked(tiny, 2)
    silo, untouched = open_silo(job), open_silo(job)
    order, times = first_order(job, silo), iter(range(100))
    steps = Rank.steps

    def fails_once(self: Rank, order: RoundOrder, team: Team, *more: Any) -> Any:
        if team.rank == 1 and next(times) == 0:
            raise SiloError("the fan is broken")
        return steps(self, order, team, *more)

    monkeypatch.setattr(Rank, "steps", fails_once)
    with pytest.raises(SiloError, match=r"rank 1 of 2: SiloError: the fan is broken"):
        silo.obey(order)
    assert_same(silo.obey(order), untouched.obey(order))


def test_a_rank_that_is_killed_fails_the_silo_and_the_next_order_succeeds(tiny, open_silo):
    """With processes that really die: while they train, and while they wait. They have a part of the moments each."""
    job = ranked(tiny, 2, shard="moments", local_steps=6)
    silo = open_silo(job, start=start_processes)
    order = first_order(job, silo)
    with rank_1_killed_before_batch(silo, 3), pytest.raises(SiloError, match=r"rank 0 of 2 lost another"):
        silo.obey(order)
    first = silo.obey(order)
    assert_same(first, open_silo(job).obey(order))  # whose follower is a thread
    kill_rank_1(silo)
    assert silo.obey(next_order(order, first)).steps == 6


@contextmanager
def rank_1_killed_before_batch(silo: Silo, last: int) -> Iterator[None]:
    batches = silo.stream.batches

    def killing(position: Any, steps: int) -> Iterator[np.ndarray]:
        for number, batch in enumerate(batches(position, steps)):
            if number == last:
                kill_rank_1(silo)
            yield batch

    silo.stream.batches = killing
    yield
    silo.stream.batches = batches


def kill_rank_1(silo: Silo) -> None:
    crew: Any = silo._others._crew
    os.kill(crew.processes[0].pid, signal.SIGKILL)
    crew.processes[0].wait()


def test_a_rank_that_never_comes_is_told(tiny, open_silo):
    class Nobody(Threads):
        def __init__(self, port: int, spec: SiloSpec) -> None:
            self.threads = []

    job = tiny("spec", resources={"ranks": 2}, faults={"start_timeout_s": 0.2})
    silo = open_silo(job, start=Nobody)
    with pytest.raises(SiloError, match=r"did not start within faults\.start_timeout_s = 0\.2"):
        silo.obey(first_order(job, silo))


def test_ranks_that_cannot_meet_are_let_go_and_the_next_order_succeeds(tiny, open_silo, monkeypatch):
    def no_port(*args: object) -> Team:
        raise SiloError("rank 0 cannot open a port")

    ended: list[int] = []

    class Counted(Threads):
        def end(self) -> None:
            ended.append(len(self.threads))

    job = tiny("spec", resources={"ranks": 2})
    silo = open_silo(job, start=Counted)
    with monkeypatch.context() as patch:
        patch.setattr(crew_module, "join", no_port)
        with pytest.raises(SiloError, match="cannot open a port"):
            silo.obey(first_order(job, silo))
    assert ended == [1]
    assert silo.obey(first_order(job, silo)).steps == job.inner.local_steps


def test_a_card_tells_the_ranks_and_their_threads_are_the_silo_s_shared(tiny, open_silo):
    job = tiny("std", inner={"threads": 4}, resources={"ranks": 2})
    assert open_silo(job).card().hardware == "cpu, 2 threads, fp32, 2 ranks"


# ------------------------------------------------------------------------------------------------ the team


def together(size: int, what: Callable[[Team], Any], timeout_s: float = 20.0) -> list[Any]:
    """What each rank of a team gets; an error stands in its place."""
    store, found = new_store(timeout_s), [None] * size

    def be(rank: int) -> None:
        try:
            found[rank] = what(join(open_store(store.port, timeout_s), rank, size, gpu=False, timeout_s=timeout_s))
        except SiloError as err:
            found[rank] = err

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(team_module).failed == 0


def test_ranks_share_a_batch_without_rest():
    batch = np.arange(12).reshape(6, 2)
    shares = [Team(rank, 3).rows(batch) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(shares), batch)
    assert {len(share) for share in shares} == {2}


def test_sums_are_the_same_bits_on_every_rank():
    def one(team: Team) -> torch.Tensor:
        values = torch.randn(1001, generator=torch.Generator().manual_seed(team.rank))
        team.sum([values])
        return values

    found = together(3, one)
    assert all(torch.equal(values, found[0]) for values in found)
    expected = sum(torch.randn(1001, generator=torch.Generator().manual_seed(rank)) for rank in range(3))
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_what_is_so_on_one_rank_is_so_on_all():
    assert together(2, lambda team: (team.any(team.rank == 1), team.any(False))) == [(True, False)] * 2


def test_ranks_that_drift_apart_are_told():
    def one(team: Team) -> bool:
        mine = torch.zeros(5)
        team.check_equal([mine])
        mine[3] += 1e-30 * team.rank
        team.check_equal([mine])
        return True

    for found in together(2, one):
        assert isinstance(found, SiloError)
        assert "do not have the same parameters" in str(found)


def test_a_rank_that_is_silent_is_not_waited_for_for_ever():
    silent = threading.Event()

    def one(team: Team) -> Any:
        if team.rank == 1:
            silent.wait(20)
            return None
        try:
            return team.any(True)
        finally:
            silent.set()

    lost, _ = together(2, one, timeout_s=1.0)
    assert isinstance(lost, SiloError)


def test_a_rank_that_ends_in_the_middle_of_a_message_is_not_waited_for() -> None:
    """Gloo waits for the rest; so this one says nothing, and is known to be gone."""
    store, over = new_store(20), threading.Event()

    def silent() -> None:
        there = join(open_store(store.port, 20), 1, 2, gpu=False, timeout_s=20)
        over.wait(15)
        assert there.rank == 1

    thread = threading.Thread(target=silent)
    thread.start()
    team = join(store, 0, 2, gpu=False, timeout_s=20, gone=lambda: True)
    values = torch.zeros(1000)
    with pytest.raises(SiloError, match="rank 0 of 2 lost another: its process has ended"):
        team.sum([values])
    del team
    assert thread.is_alive(), "the end of a team does not wait for the sum either"
    over.set()
    thread.join()
