"""On a cluster a silo of several ranks is one silo: one actor, whose other ranks live and die with it."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from head import below
from nodes import until
from test_pool import run_through

from dept_ray.config import Job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
Make = Callable[..., Job]


def mixed(tiny: Make, at: str, ranks: int, shard: str = "auto", **more: Any) -> Job:
    """Silo `code` has so many ranks, the others one."""
    job = tiny("spec", at=at, inner={"eps": 1e-6}, **more)
    resources = job.resources.model_copy(update={"ranks": ranks, "shard": shard})
    sources = [s.model_copy(update={"resources": resources}) if s.name == "code" else s for s in job.sources]
    return job.model_copy(update={"sources": tuple(sources)})


@pytest.mark.parametrize(("shard", "cut"), [("moments", "moments"), ("all", "model")])
def test_a_run_with_a_silo_of_two_ranks_equals_one_of_single_ones(tiny: Make, shard: str, cut: str) -> None:
    from dept_ray.on_ray.pool import RayPool
    from dept_ray.rounds.pool import LocalPool

    expected, expected_records = run_through(mixed(tiny, "here", 1), LocalPool())
    pool = RayPool()
    state, records = run_through(mixed(tiny, "there", 2, shard), pool)
    assert pool.cards["code"].hardware.endswith(f"2 ranks, {cut} in 2 parts")
    assert [r["loss"] for r in records[:3]] == pytest.approx([r["loss"] for r in expected_records[:3]], rel=1e-5)
    assert {n: (s.position, s.tokens) for n, s in state.silos.items()} == {
        n: (s.position, s.tokens) for n, s in expected.silos.items()
    }
    assert records[-1]["mean"] == pytest.approx(expected_records[-1]["mean"], rel=1e-5)


def test_whichever_rank_is_killed_the_silo_fails_once_and_goes_on(tiny: Make) -> None:
    """First the one that follows, then the one that obeys; nobody of an old silo is left."""
    from dept_ray.on_ray.pool import RayPool

    job = mixed(tiny, "killed", 2, rounds={"total": 4}, faults={"patience_s": 300})
    job = job.model_copy(update={"inner": job.inner.model_copy(update={"local_steps": 300})})
    pool, seen = RayPool(), set[int]()

    def trains_in(round: int) -> bool:
        code = pool.statuses().get("code")
        return code is not None and (code.round, code.doing) == (round, "training") and bool(followers())

    def kill() -> None:
        for round, follows in ((1, True), (2, False)):
            until(partial(trains_in, round))
            obeys, others = pool.statuses()["code"].pid, followers()
            seen.update({obeys, *others})
            os.kill(others[0] if follows else obeys, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    _, records = run_through(job, pool)
    killer.join(1)
    assert [list(r["refused"]) for r in records[:4]] == [[], ["code"], ["code"], []]
    assert "rank" in records[1]["refused"]["code"]
    assert "ActorDied" in records[2]["refused"]["code"]
    assert len(seen) == 3, "a rank 0 whose follower was killed gets another"
    until(lambda: not followers() and not any(os.path.exists(f"/proc/{pid}") for pid in seen))


def followers() -> list[int]:
    """Processes that are other ranks of a silo, on this test's own Ray."""
    found = []
    for pid in below(os.getpid()):
        with suppress(OSError):
            if b"dept_ray.silo.follower" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
