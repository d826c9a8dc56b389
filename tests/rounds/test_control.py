"""Hands on a live run: pause, let rounds through, stop, ask; from another thread, and answered at once."""

import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch

from dept_ray.config import Job
from dept_ray.errors import RunError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.snapshot import silo_folder

PATIENCE_S = 60
"""Nothing takes so long; it only turns a deadlock into a failure."""


class WatchedControl(Control):
    """Tells when the loop holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Semaphore(0)

    def wait_for_turn(self) -> None:
        if self.holding:
            self.held.release()
        super().wait_for_turn()


class GatedPool(LocalPool):
    """Each round of training waits for the test to let it begin."""

    def __init__(self, *, gated: bool = True) -> None:
        super().__init__()
        self.begun, self.gate, self.gated = threading.Semaphore(0), threading.Semaphore(0), gated

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        if self.gated and any(order.steps for order in orders.values()):
            self.begun.release()
            assert self.gate.acquire(timeout=PATIENCE_S)
        return super().run_round(orders, deadline, meanwhile)


class Live:
    """A run in a thread of its own."""

    def __init__(self, job: Job, *, gated: bool = False, control: WatchedControl | None = None) -> None:
        self.control, self.pool, self.store = control or WatchedControl(), GatedPool(gated=gated), RunStore(job)
        self.records: list[dict[str, Any]] = []
        self.state: RunState | None = None
        self.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self.thread.start()

    def _run(self, job: Job) -> None:
        self.state = train(job, self.pool, self.store, self.records.append, self.control)
        self.pool.close()

    def wait_until_held(self) -> int:
        """Rounds done when it holds."""
        assert self.control.held.acquire(timeout=PATIENCE_S)
        return self.rounds

    @property
    def rounds(self) -> int:
        return sum(record["event"] == "round" for record in self.records)

    def join(self) -> RunState:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        assert self.state is not None
        return self.state


@pytest.fixture
def job(tiny) -> Job:
    return tiny("spec", inner={"local_steps": 1}, rounds={"total": 4, "score_every": 0})


def paused() -> WatchedControl:
    control = WatchedControl()
    control.pause()
    return control


def test_a_paused_run_holds_after_the_round_in_progress_and_goes_on_when_told(job):
    live = Live(job, gated=True)
    assert live.pool.begun.acquire(timeout=PATIENCE_S)
    live.control.pause()  # while it trains
    assert live.rounds == 0
    live.pool.gate.release()
    assert live.wait_until_held() == 1
    assert live.store.rounds() == [1]
    live.pool.gated = False
    live.control.resume()
    assert live.join().round == 4


def test_a_run_that_is_paused_before_it_begins_trains_nothing(job):
    live = Live(job, control=paused())
    assert live.wait_until_held() == 0
    live.control.stop()
    assert live.join().round == 0
    assert (live.records, live.store.rounds()) == ([], [])


@pytest.mark.parametrize("steps", [(1,), (2,), (1, 2)])
def test_so_many_rounds_are_let_through(job, steps):
    live = Live(job, control=paused())
    assert live.wait_until_held() == 0
    for at, count in enumerate(steps):
        live.control.step(count)
        assert live.wait_until_held() == sum(steps[: at + 1])
    live.control.resume()
    assert live.join().round == 4


def test_steps_add_up_and_a_pause_forgets_them(job):
    live = Live(job, gated=True)
    assert live.pool.begun.acquire(timeout=PATIENCE_S)  # the first round, before anyone asked
    live.control.step(1)
    live.control.step(1)
    live.pool.gate.release(3)
    assert live.wait_until_held() == 3
    live.control.step(5)
    assert live.pool.begun.acquire(timeout=PATIENCE_S)
    live.control.pause()
    live.pool.gate.release()
    live.control.stop()
    live.join()


def test_more_steps_than_rounds_are_no_harm(job):
    live = Live(job, control=paused())
    live.control.step(99)
    assert live.join().round == 4


def test_a_paused_run_can_be_stopped_and_goes_on_another_time(job):
    live = Live(job, control=paused())
    live.wait_until_held()
    live.control.step(2)
    assert live.wait_until_held() == 2
    live.control.stop()
    assert live.join().round == 2
    assert [record["event"] for record in live.records] == ["round", "round"]
    assert Live(job).join().round == 4


def test_stop_ends_after_the_round_in_progress_is_committed(job):
    live = Live(job, gated=True)
    assert live.pool.begun.acquire(timeout=PATIENCE_S)
    live.control.stop()
    live.pool.gate.release()
    assert live.join().round == 1
    assert live.store.rounds() == [1]


def test_a_pause_changes_no_bit(tiny):
    same = {"inner": {"local_steps": 1}, "rounds": {"total": 3}}
    live = Live(tiny("spec", at="held", **same), control=paused())
    for _ in range(3):
        live.wait_until_held()
        live.control.step(1)
    held, through = live.join(), Live(tiny("spec", at="through", **same)).join()
    assert torch.equal(held.body, through.body)
    assert held.silos == through.silos


def test_asking_and_looking_do_not_wait_for_a_round(job):
    """All requests are answered while a silo is in the middle of its round, which nothing lets end."""
    live = Live(job, gated=True)
    assert live.pool.begun.acquire(timeout=PATIENCE_S)
    live.control.pause()
    live.control.step(1)
    live.control.resume()
    live.control.change({"set": "inner.lr", "to": 1e-3})
    assert sorted(live.pool.statuses()) == ["code", "latin", "numbers"]
    live.control.stop()
    assert live.rounds == 0
    live.pool.gate.release()
    assert live.join().round == 1


def test_a_change_acts_while_the_run_is_held(job):
    live = Live(job, control=paused())
    live.wait_until_held()
    live.control.change({"set": "inner.lr", "to": 1e-3})
    live.wait_until_held()  # it holds again
    assert [(record["event"], record["change"]) for record in live.records] == [
        ("change", {"set": "inner.lr", "to": 1e-3})
    ]
    live.control.resume()
    assert live.join().changes == ({"set": "inner.lr", "to": 1e-3},)


def test_many_hands_at_once_leave_the_run_whole(job):
    """Every kind of request from several threads while rounds go by, and until the run says that it is over; what was
    heard is done."""
    live, threads, heard = Live(job), [], list[int]()
    for number in range(4):

        def hands(number: int = number) -> None:
            with suppress(RunError):
                for at in range(25):
                    live.control.pause()
                    live.control.step(at % 3)
                    live.control.change({"set": "inner.lr", "to": 1e-3 * (1 + number)})
                    heard.append(number)
                    live.control.resume()

        threads.append(threading.Thread(target=hands))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    with suppress(RunError):
        live.control.resume()
    state = live.join()
    assert state.round == 4
    assert read_records(live.store.metrics) == []  # the log here is the list
    assert [r["change"] for r in live.records if r["event"] == "change"] == list(state.changes)
    assert len(state.changes) == len(heard) > 0


def test_a_run_that_is_made_longer_in_its_last_round_goes_on(job):
    live = Live(job, gated=True)
    for _ in range(3):
        assert live.pool.begun.acquire(timeout=PATIENCE_S)
        live.pool.gate.release()
    assert live.pool.begun.acquire(timeout=PATIENCE_S)  # the fourth of four
    live.control.change({"set": "rounds.total", "to": 6})
    live.pool.gated = False
    live.pool.gate.release()
    assert live.join().round == 6


# ------------------------------------------------------------------------------------------------ kept for good


@pytest.mark.parametrize("method", ["spec-opt", "isolated"])
def test_a_kept_round_can_be_gone_back_to_when_its_neighbours_are_long_gone(tiny, method):
    """Its snapshots are kept too, though the silos prune theirs."""
    job = tiny(method, inner={"local_steps": 1, "optimizer_state": "keep"}, rounds={"total": 7, "keep": 1})
    store, control, records = RunStore(job), Control(), list[dict[str, Any]]()

    def watch(record: dict[str, Any]) -> None:
        records.append(record)
        if record["event"] == "round" and record["round"] == 2:
            assert control.checkpoint() == 2

    expected = train(job, pool := LocalPool(), store, watch, control)
    pool.close()
    assert store.rounds() == [2, 7]
    assert sorted(store.kept()) == [2]
    for name in expected.silos:
        there = {path.name for path in silo_folder(job, name).iterdir()}
        assert there == {"000001-0-0", "000004-0-0", "000005-0-0", "000006-0-0"}
    shutil.rmtree(store.folder / "rounds" / "000007")
    again = train(job, pool := LocalPool(), RunStore(job), records.append, Control())
    pool.close()
    assert again.silos == expected.silos
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_checkpoint_while_the_run_is_held_keeps_the_last_round(job):
    live = Live(job, control=paused())
    assert live.wait_until_held() == 0
    live.control.checkpoint()  # there is none yet: the first will be
    live.control.step(1)
    assert live.wait_until_held() == 1
    live.control.step(2)
    assert live.wait_until_held() == 3
    assert live.control.checkpoint() == 3
    assert live.wait_until_held() == 3  # it looked, and holds again
    assert sorted(live.store.kept()) == [1, 3]
    live.control.stop()
    live.join()
