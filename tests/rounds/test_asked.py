"""What is asked of a run is kept for whoever comes after and obeyed once; what nobody will obey is refused at once."""

from collections.abc import Mapping
from typing import Any

import pytest

from dept_ray.errors import RunError, StoreError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import Log
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import LocalPool
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train


class Memory:
    """Keeps what is asked, unless it is full."""

    kept: dict[str, Any] | None = None
    full = False

    def asked(self) -> dict[str, Any] | None:
        return self.kept

    def keep_asked(self, asked: dict[str, Any]) -> None:
        if self.full:
            raise StoreError("the disk is full")
        self.kept = asked


def test_changes_are_taken_once_and_in_order():
    control, changes = Control(), [{"set": "inner.lr", "to": value} for value in (1e-3, 1e-4)]
    for change in changes:
        control.change(change)
    assert control.take_changes() == changes
    assert control.take_changes() == []


def test_a_pause_is_kept_for_a_run_that_comes_back_by_itself_and_not_for_one_that_is_started_again():
    memory, first = Memory(), Control()
    first.step(2)
    first.begin(5, 0, memory)
    first.change({"drop": "a"})
    assert memory.kept is not None
    assert (memory.kept["hold_at"], memory.kept["changes"]) == (7, [{"drop": "a"}])
    back, anew = Control(again=True), Control()
    back.begin(6, 0, memory)
    assert [back.begin_round(), back.begin_round()] == [True, False]
    assert back.take_changes() == [{"drop": "a"}]
    anew.begin(6, 0, memory)
    assert anew.begin_round()
    assert anew.take_changes() == [{"drop": "a"}]
    spoken = Control(again=True)
    spoken.resume()
    spoken.begin(7, 1, memory)
    assert spoken.begin_round()
    assert spoken.take_changes() == []  # the round that was committed heard it


def test_who_asks_again_because_the_answer_was_lost_is_heard_once():
    memory, first = Memory(), Control()
    first.begin(5, 0, memory)
    first.step(3, "a")
    first.change({"drop": "x"}, "b")
    back = Control(again=True)
    back.begin(5, 0, memory)
    back.step(3, "a")
    back.change({"drop": "x"}, "b")
    assert back.knows("b")
    assert back.take_changes() == [{"drop": "x"}]
    assert [back.begin_round() for _ in range(4)] == [True, True, True, False]


def test_what_could_not_be_kept_was_not_asked():
    memory, control = Memory(), Control()
    control.begin(5, 0, memory)
    memory.full = True
    for ask in (control.pause, control.stop, control.checkpoint, lambda: control.change({"drop": "x"}, "b")):
        with pytest.raises(StoreError, match="full"):
            ask()
    assert control.pending == []
    assert not control.stopping
    assert control.begin_round()
    assert not control.take_checkpoint(9)
    control.committed(0)  # needs no disk
    memory.full = False
    control.change({"drop": "x"}, "b")  # the same request, asked again
    assert control.pending == [{"drop": "x"}]


def test_a_checkpoint_is_for_the_round_that_was_named_whoever_dies():
    memory, first = Memory(), Control()
    first.begin(6, 0, memory)
    assert first.begin_round()
    assert first.checkpoint() == 7
    back = Control(again=True)
    back.begin(6, 0, memory)
    assert [back.take_checkpoint(6), back.take_checkpoint(7), back.take_checkpoint(8)] == [False, True, False]


def test_a_run_ends_when_nothing_is_left_to_be_obeyed_and_then_nothing_can_be_asked():
    control = Control()
    control.begin(3, 0, Memory())
    control.change({"drop": "x"})
    assert not control.end()
    assert control.take_changes() == [{"drop": "x"}]
    control.checkpoint()
    assert not control.end()
    assert control.take_checkpoint(3)
    assert control.end()
    with pytest.raises(RunError, match="has made its last round"):
        control.change({"return": "x"})


@pytest.mark.parametrize("stopping", [False, True])
def test_of_a_run_that_is_being_scored_nothing_more_can_be_asked(tiny, stopping):
    """It would be promised, and not done; stopping what ends by itself is no fault."""
    job, control, asked = tiny("spec", rounds={"total": 1}), Control(), list[str]()

    class Scoring(LocalPool):
        def run_round(self, orders: Mapping[str, RoundOrder], *more: Any) -> dict[str, SiloUpdate | Exception]:
            if any(order.steps for order in orders.values()):
                if stopping:
                    control.stop()
            else:
                for ask in (control.pause, control.checkpoint, lambda: control.change({"drop": "code"})):
                    with pytest.raises(RunError, match="has made its last round"):
                        ask()
                    asked.append("in vain")
                control.stop()
            return super().run_round(orders, *more)

    pool = Scoring()
    train(job, pool, RunStore(job), Log(), control)
    pool.close()
    assert asked == ["in vain"] * 3
