"""RayPool is LocalPool's twin: the same orders give the same bits, and what dies is made anew."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nodes import until

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloStatus, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import Log
from dept_ray.on_ray.places import LOOK_EVERY_S
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import load_round, run_folder
from dept_ray.rounds.pool import LocalPool, SiloPool
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.silo import Silo

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
Make = Callable[..., Job]


def run_through(job: Job, pool: SiloPool, stop_after: int | None = None) -> tuple[RunState, list[dict[str, Any]]]:
    """Train with a pool; its state and records."""
    control, records = Control(), list[dict[str, Any]]()

    def watch(record: dict[str, Any]) -> None:
        if record["round"] == stop_after:
            control.stop()

    try:
        return train(job, pool, RunStore(job), Log(records.append, watch), control), records
    finally:
        pool.close()


class Going:
    """A run in which `code` has handed in, and goes ahead while the others train."""

    def __init__(self, job: Job) -> None:
        from dept_ray.on_ray.pool import RayPool

        self.pool, self.control, self.records = RayPool(), Control(), list[dict[str, Any]]()
        arguments = job, self.pool, RunStore(job), Log(self.records.append), self.control
        self.rounds = threading.Thread(target=train, args=arguments, daemon=True)
        self.rounds.start()
        until(lambda: set(self.doing().values()) == {"training"})
        self.control.pause()
        self.pool.places.actors["code"].stop.remote(0, 0)
        until(lambda: self.doing()["code"] == "going ahead")

    def doing(self) -> dict[str, str]:
        self.pool.places.poll(self.pool.cards)
        return {name: status.doing for name, status in self.pool.statuses().items()}

    def end(self) -> None:
        """All hand in, and the run ends."""
        self.pool.hand_in(0)
        until(lambda: self.control.paused)
        until(lambda: set(self.doing().values()) == {"waiting"})
        self.control.stop()
        self.rounds.join()
        self.pool.close()


LONG: dict[str, Any] = {"inner": {"local_steps": 40_000, "ahead_steps": 40_000}, "rounds": {"score_every": 0}}


def test_who_goes_ahead_of_a_run_that_is_held_ends_at_once(tiny: Make) -> None:
    """Once the round is a fact nobody goes on."""
    going = Going(tiny("spec", **LONG))
    going.end()
    (record,) = going.records
    assert all(0 < silo["steps"] < 40_000 for silo in record["silos"].values())


def test_who_goes_ahead_goes_on_until_its_order_is_all_there(tiny: Make, tmp_path: Path) -> None:
    """Also while the body is on its way, which is what it need not wait for."""
    import ray

    @ray.remote(num_cpus=0)
    def body() -> None:
        while not (tmp_path / "there").exists():
            time.sleep(0.05)

    @ray.remote(num_cpus=0)
    def ask(silo: Any) -> Any:
        return ray.get(silo.status.remote())

    going = Going(tiny("spec", **LONG))
    code = going.pool.places.actors["code"]
    going.pool._end_ahead("code", body.remote())
    # Ray keeps one caller's calls in order: what it asks next waits as well, as it does behind an order.
    begun = ray.get(ask.remote(code)).step
    until(lambda: (now := ray.get(ask.remote(code))).doing == "going ahead" and now.step > begun)
    (tmp_path / "there").touch()
    until(lambda: going.doing()["code"] == "waiting")
    going.end()


@pytest.mark.parametrize("what", ["all have taken it up", "one takes too long"])
def test_a_round_is_written_when_the_next_one_is_taken_up(
    tiny: Make, tmp_path: Path, monkeypatch: Any, what: str
) -> None:
    """Until then memory is the silos', for who waits for it makes all wait; but not for ever."""
    from dept_ray.on_ray import pool as room

    class Slow(Silo):
        def obey(self, order: RoundOrder) -> SiloUpdate:
            while order.round and self.spec.silo == "code" and not (tmp_path / "there").exists():
                time.sleep(0.05)
            return super().obey(order)

    def standing() -> dict[str, tuple[int, str]]:
        return {name: (status.round, status.doing) for name, status in pool.statuses().items()}

    monkeypatch.setattr(room, "TAKING_UP_S", 600.0)
    job = tiny("glob", inner={"local_steps": 40_000}, rounds={"score_every": 0})
    pool, control, store = room.RayPool(make=Slow), Control(), RunStore(job)
    rounds = threading.Thread(target=train, args=(job, pool, store, Log(), control), daemon=True)
    rounds.start()
    try:
        until(lambda: set(standing().values()) == {(0, "training")})
        pool.hand_in(0)
        until(lambda: {standing()[name] for name in ("latin", "numbers")} == {(1, "training")})
        time.sleep(2 * LOOK_EVERY_S)
        assert store.rounds() == []
        if what == "one takes too long":
            monkeypatch.setattr(room, "TAKING_UP_S", 0.0)
        else:
            (tmp_path / "there").touch()
        until(lambda: store.rounds() == [1])
        assert standing()["code"][1] == ("training" if what == "all have taken it up" else "waiting")
    finally:
        (tmp_path / "there").touch()
        control.stop()
        pool.hand_in(1)
        rounds.join()
        pool.close()


def curve(records: list[dict[str, Any]]) -> list[Any]:
    """What must not differ between two runs of one job."""
    return [(r["event"], r["round"], r.get("loss"), r.get("scores"), r.get("sent_bytes")) for r in records]


@pytest.mark.parametrize(
    "method", [m if m in ("glob", "spec-opt", "act") else pytest.param(m, marks=pytest.mark.soak) for m in METHOD_NAMES]
)
def test_stopped_and_resumed_on_ray_equals_uninterrupted_in_process_bit_for_bit(tiny: Make, method: str) -> None:
    """Under GLOB silos make steps ahead of their orders, on Ray before they are there."""
    from dept_ray.on_ray.pool import RayPool

    inner = {"ahead_steps": 2 if method == "glob" else 0}
    expected, expected_records = run_through(tiny(method, at="here", inner=inner), LocalPool())
    job = tiny(method, at="there", inner=inner)
    _, first = run_through(job, RayPool(), stop_after=1)
    state, second = run_through(job, RayPool())
    assert [r["round"] for r in first] == [1, 2]  # which was in progress when round 1 had been committed
    assert curve(first + second) == curve(expected_records)
    assert state.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(state.tensors[name], tensor), name
    assert {n: (s.position, s.tokens) for n, s in state.silos.items()} == {
        n: (s.position, s.tokens) for n, s in expected.silos.items()
    }


@pytest.mark.parametrize(("method", "codec"), [("trim", "int4"), ("spec-opt", "bf16"), ("glob", "int4-zstd")])
def test_coded_rounds_on_ray_are_those_in_process_bit_for_bit(tiny: Make, method: str, codec: str) -> None:
    from dept_ray.on_ray.pool import RayPool

    wire = {"codec": codec}
    expected, expected_records = run_through(tiny(method, at="here", wire=wire), LocalPool())
    state, records = run_through(tiny(method, at="there", wire=wire), RayPool())
    assert curve(records) == curve(expected_records)  # bytes too: every silo holds what it was told before
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert "body_residual" in state.tensors


class LosesCode:
    """A run of two long rounds, in the first of which `code` is killed while all train."""

    def __init__(self, job: Job) -> None:
        from dept_ray.on_ray.pool import RayPool

        class Paced(Silo):
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                batches = self.stream.batches

                def paced(*asked: Any) -> Iterator[np.ndarray]:
                    for batch in batches(*asked):
                        yield batch
                        time.sleep(0.05)

                self.stream.batches = paced

        self.pool, self.records = RayPool(make=Paced), list[dict[str, Any]]()
        arguments = job, self.pool, RunStore(job), Log(self.records.append), Control()
        self.rounds = threading.Thread(target=train, args=arguments, daemon=True)
        self.rounds.start()
        until(lambda: {status.doing for status in self.statuses().values()} == {"training"})
        self.pid = self.statuses()["code"].pid
        os.kill(self.pid, signal.SIGKILL)

    def statuses(self) -> dict[str, SiloStatus]:
        return {name: status for name, status in self.pool.statuses().items() if name in self.pool.cards}

    def others_hand_in(self) -> None:
        for name in ("latin", "numbers"):
            self.pool.places.actors[name].stop.remote(0, 0)

    def end(self) -> list[dict[str, Any]]:
        """The second round is handed in once all train; the records of both."""
        until(lambda: {(s.round, s.doing) for s in self.statuses().values()} == {(1, "training")})
        self.pool.hand_in(1)
        self.rounds.join()
        self.pool.close()
        return self.records[:2]


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_silo_that_is_killed_takes_its_order_again_while_others_train(tiny: Make, codec: str) -> None:
    """It hands in what it has when they are done; to the bit as if it had been asked no sooner.

    Under a codec, too, where the order told it how to go on from what it held: the second time it gets the whole.
    """
    long: dict[str, Any] = {
        "inner": {"local_steps": 40_000}, "rounds": {"total": 2, "score_every": 0}, "wire": {"codec": codec}
    }  # fmt: skip
    run = LosesCode(job := tiny("glob", at="there", **long))
    until(lambda: (code := run.statuses()["code"]).pid not in (0, run.pid) and code.step > 0)
    run.others_hand_in()
    first, second = run.end()
    assert first["refused"] == second["refused"] == {}
    code = first["silos"]["code"]
    assert "ActorDied" in code["lost"]
    assert 0 < code["steps"] < 40_000
    assert code["tokens"] == code["steps"] * 4 * 32
    state, _ = load_round(run_folder(job), 2)
    whole = sum(4 * state.tensors[name].numel() for name in ("body", "rows"))
    others = first["silos"]["latin"]["down_bytes"]
    assert (others, code["down_bytes"]) == ((0, whole) if codec == "int4" else (whole, 2 * whole))
    assert all("lost" not in silo for silo in (first["silos"]["latin"], *second["silos"].values()))

    class HandsIn(Silo):
        def obey(self, order: RoundOrder) -> SiloUpdate:
            if not order.steps:  # the closing scores
                return super().obey(order)
            batches, steps = self.stream.batches, (first, second)[order.round]["silos"][order.silo]["steps"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.stream, "batches", lambda *asked: islice(batches(*asked), steps))
                return super().obey(order)

    expected, _ = run_through(tiny("glob", at="here", **long), LocalPool(make=HandsIn))
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert {n: s.position for n, s in state.silos.items()} == {n: s.position for n, s in expected.silos.items()}


def test_a_silo_that_is_killed_too_late_is_left_out_once_and_made_anew(tiny: Make) -> None:
    """Nobody waits for who has not begun to train again when the others are done."""
    inner, faults = {"local_steps": 40_000}, {"patience_s": 300}
    run = LosesCode(tiny("spec", inner=inner, rounds={"total": 2, "score_every": 0}, faults=faults))
    run.others_hand_in()
    first, second = run.end()
    assert list(first["refused"]) == ["code"]
    assert "ActorDied" in first["refused"]["code"]
    assert set(second["silos"]) == {"code", "latin", "numbers"}


def test_who_was_asked_again_is_waited_for_if_it_has_begun() -> None:
    """Who has answered since, and goes ahead or waits, has begun; nobody is judged twice."""
    from dept_ray.on_ray.pool import _Round

    doing = {
        "opening": (-1, "opening"), "loading": (4, "loading"), "compiling": (4, "compiling"), "behind": (3, "waiting"),
        "training": (4, "training"), "saving": (4, "saving"), "answered": (4, "waiting"), "ahead": (5, "going ahead"),
    }  # fmt: skip
    stopped = list[str]()
    names, orders = sorted(doing), {name: SimpleNamespace(silo=name, round=4, attempt=0) for name in doing}
    silo = lambda name: SimpleNamespace(stop=SimpleNamespace(remote=lambda *_: stopped.append(name)))  # noqa: E731
    places = SimpleNamespace(
        actors={name: silo(name) for name in doing},
        statuses=lambda: {name: SiloStatus(name, what, round) for name, (round, what) in doing.items()},
    )
    round: Any = _Round(orders, places, lambda order, again: [None], None)  # pyright: ignore[reportArgumentType]
    round._end_with_the_others()
    assert sorted(stopped) == names
    assert sorted(round.calls) == ["ahead", "answered", "saving", "training"]
    doing["training"] = 4, "loading"
    round._end_with_the_others()
    assert "training" in round.calls


def test_a_late_silo_hands_in_what_it_has_and_one_that_cannot_is_made_anew(tiny: Make) -> None:
    import ray

    from dept_ray.on_ray.pool import RayPool

    faults = {"deadline_floor_s": 1.0, "deadline_cap_s": 4.0, "grace_s": 20.0}
    job = tiny("spec", inner={"local_steps": 30_000}, rounds={"total": 2}, faults=faults)
    pool = RayPool()

    def freeze_code_in_the_second_round() -> None:
        while (status := pool.statuses().get("code")) is None or (status.round, status.doing) != (1, "training"):
            time.sleep(0.05)
        os.kill(ray.get(pool.places.actors["code"].status.remote()).pid, signal.SIGSTOP)

    freezer = threading.Thread(target=freeze_code_in_the_second_round, daemon=True)
    freezer.start()
    state, records = run_through(job, pool)
    freezer.join()
    first, second = records[:2]
    assert set(first["silos"]) == {"code", "latin", "numbers"}
    assert all(0 < silo["steps"] < 30_000 for silo in first["silos"].values())
    assert first["silos"]["code"]["tokens"] == first["silos"]["code"]["steps"] * 4 * 32
    assert list(second["refused"]) == ["code"]
    assert "late: no answer" in second["refused"]["code"]
    assert state.silos["latin"].position["latin"] == state.silos["latin"].tokens // 32


def test_an_error_in_a_silo_comes_back_as_our_own(tiny: Make) -> None:
    from dept_ray.errors import SiloError
    from dept_ray.on_ray.pool import RayPool

    job = tiny("spec", inner={"batch_size": 4096})
    with pytest.raises(SiloError, match=r"fewer than one batch \(inner\.batch_size = 4096\)"):
        run_through(job, RayPool())


def test_a_newcomer_that_was_being_prepared_when_the_coordinator_died_still_joins(prepared, tmp_path) -> None:
    from nodes import until
    from ordeals import newcomer, smallest

    from dept_ray.on_ray.pool import RayPool
    from dept_ray.rounds.changes import changed

    first = smallest(prepared, tmp_path / "run", "spec-opt")
    pool = RayPool()
    pool.open(changed(first, [{"add": newcomer(prepared, "straggler")}]), first)
    try:
        until(lambda: "straggler" in pool.ready())
    finally:
        pool.close()
    assert pool.failed() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_from_the_second_round_on_steps_let_others_go_first(tiny: Make) -> None:
    """And nothing else that a silo does: what it takes up and hands in is waited for."""
    from dept_ray.on_ray.pool import RayPool

    job = tiny("spec", rounds={"total": 3, "score_every": 0})
    notes = Path(job.folder) / "notes"

    def make(*args: Any, **named: Any) -> Silo:
        silo = Silo(*args, **named)
        batches, obey = silo.stream.batches, silo.obey

        def note(what: str) -> None:
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            with notes.open("a") as file:
                file.write(f"{what} {nice} {torch.get_num_threads()}\n")

        def noted(position: Any, steps: int) -> Iterator[np.ndarray]:
            yield from (batch for batch in batches(position, steps) if note("step") is None)

        def noted_too(order: RoundOrder) -> SiloUpdate:
            note("order")
            try:
                return obey(order)
            finally:
                note("answer")

        silo.stream.batches, silo.obey = noted, noted_too
        return silo

    run_through(job, RayPool(make=make))
    seen = [line.split() for line in notes.read_text().splitlines()]
    usual = {nice for what, nice, _ in seen if what != "step"}
    assert len(usual) == 1
    assert {nice for what, nice, _ in seen if what == "step"} == {*usual, "19"}
    first, later = 3 * job.inner.local_steps, 2 * 3 * job.inner.local_steps
    assert Counter(nice for what, nice, _ in seen if what == "step") == {min(usual): first, "19": later}
    assert {threads for *_, threads in seen} == {"1"}
