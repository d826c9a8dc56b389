"""What is known to be refused is refused when it is asked for, and a source that never could join can be mended."""

from typing import Any

import pytest
import torch
from test_changes import SHORT, dialect, rounds_of, run

from dept_ray.config import Job
from dept_ray.errors import ConfigError, DeptError
from dept_ray.messages import Change
from dept_ray.rounds.changes import check_asked, check_change
from dept_ray.rounds.pool import LocalPool


def round_of(round: int, *silos: str, **away: str) -> dict[str, Any]:
    return {"event": "round", "round": round, "silos": {name: {} for name in silos}, "away": away}


def test_a_total_that_lies_behind_is_refused_when_it_is_asked_for(tiny):
    job, records = tiny("spec", **SHORT), [round_of(1), round_of(2)]
    with pytest.raises(ConfigError, match=r"rounds\.total = 2: round 2 is committed; stop the run"):
        check_asked(job, {"set": "rounds.total", "to": 2}, records, [], LocalPool())
    assert check_asked(job, {"set": "rounds.total", "to": 3}, records, [], LocalPool()).rounds.total == 3
    assert check_asked(job, {"set": "rounds.total", "to": 1}, [], [], LocalPool()).rounds.total == 1


def test_the_last_silo_that_works_is_refused_when_its_leave_is_asked_for(tiny):
    """By what is on record, and by what others ask for."""
    job = tiny("spec", **SHORT)

    def ask(*since: Change, pending: tuple[Change, ...] = (), **away: str) -> Job:
        records = [
            round_of(1, code="long ago"),
            round_of(2, **away),
            *({"event": "change", "change": c} for c in since),
        ]
        return check_asked(job, {"drop": "numbers"}, records, pending, LocalPool())

    drops = {"drop": "code"}, {"drop": "latin"}
    for refused in (
        lambda: ask(code="dropped", latin="set aside"), lambda: ask(*drops), lambda: ask(pending=drops),
        lambda: ask({"drop": "latin"}, code="dropped"), lambda: ask({"return": "code"}, pending=drops),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="numbers is the last silo that works: let another join or return first"):
            refused()
    for allowed in (
        lambda: ask(latin="set aside"), lambda: ask(drops[0], {"return": "code"}, drops[1]),
        lambda: ask(pending=({"return": "latin"},), code="dropped", latin="dropped"),
    ):  # fmt: skip
        assert allowed() == job
    refusal = {"event": "change", "change": {"drop": "latin"}, "refused": "why"}
    assert check_asked(job, {"drop": "numbers"}, [round_of(1, code="dropped"), refusal], [], LocalPool()) == job


class Patient(LocalPool):
    """Takes every source, as a cluster does, which prepares it in the background; notes whose text is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: dict[str, str] = {}

    def add(self, job: Job, silo: str) -> None:
        self.bad.pop(silo, None)
        try:
            super().add(job, silo)
        except DeptError as err:
            self.bad[silo] = str(err)

    def failed(self) -> dict[str, str]:
        return dict(self.bad)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_source_that_never_could_join_is_mended_by_one_of_the_same_name(tiny, tmp_path, dropped):
    job = tiny("spec", **SHORT)
    bad, good = dialect(job, paths=[str(tmp_path / "nowhere.txt")], validation_paths=[]), dialect(job)
    asks = [(1, bad), *([(1, {"drop": "dialect"})] if dropped else []), (2, good), (3, bad)]
    state, records = run(job, *asks, pool=Patient())
    assert ["dialect" in record["silos"] for record in rounds_of(records)] == [False, False, True, True]
    assert "nowhere" in rounds_of(records)[1]["away"]["dialect"] or dropped
    assert [r["change"] for r in records if "refused" in r and r["event"] == "change"] == [bad], "it trains by now"
    assert list(state.changes) == [change for _, change in asks[:-1]]
    halves = tiny("spec", at="halves", **SHORT)
    run(halves, *asks[:-1], stop_after=3, pool=Patient())
    resumed, _ = run(halves, pool=Patient())
    assert resumed.silos == state.silos
    assert torch.equal(resumed.body, state.body)


def test_only_a_source_that_never_could_join_is_mended(tiny):
    job, pool = tiny("spec", **SHORT), Patient()
    job, mended = check_change(job, dialect(job)), dialect(job, max_bytes=5)
    pool.bad = {"dialect": "no text", "latin": "no text"}
    source = check_asked(job, mended, [round_of(1, "latin")], [], pool).source("dialect")
    assert (source.max_bytes, source.joined) == (5, True)
    with pytest.raises(ConfigError, match=r'the name "dialect" stands twice'):
        check_asked(job, mended, [round_of(1, "dialect"), round_of(2, "latin")], [], pool)
    with pytest.raises(ConfigError, match=r'the name "latin" stands twice'):
        check_asked(job, dialect(job, "latin"), [], [], pool)
    pool.bad = {}
    with pytest.raises(ConfigError, match=r'the name "dialect" stands twice'):
        check_asked(job, mended, [], [], pool)
