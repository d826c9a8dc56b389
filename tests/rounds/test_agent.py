"""An agent while its silos train: it goes on beating, and hears when nobody waits for more."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from tiny import SOURCES, an_answer, ready_job

from dept_ray.errors import SiloError
from dept_ray.messages import Held
from dept_ray.rounds.agent import Agent, prepare_here
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.mailbox import RUN
from dept_ray.rounds.pool import LocalPool
from dept_ray.sections import RegionsSection


class Asked(LocalPool):
    """Notes that it was asked to hand in."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def hand_in(self, round: int, attempt: int = 0) -> None:
        assert (round, attempt) == (3, 1), "what is not wanted is this attempt, and not the next"
        self.asked.set()


@pytest.mark.parametrize("how", ["asked for", "withdrawn"])
def test_what_an_order_has_is_handed_in_when_it_is_asked_for_or_the_order_is_withdrawn(tmp_path, how):
    box, pool = Mailbox(str(tmp_path)), Asked()
    agent = Agent(box, {}, LocalPool, prepare_here, name="west")
    agent.pool, agent.settings = pool, RegionsSection(look_every_s=0.01, silent_s=1)
    box.write("west/order-x-1", {})
    with agent._meanwhile("x-1", fence=(3, 1)):
        while (box.read("west/beat") or {"beat": 0})["beat"] < 5:
            time.sleep(0.01)
        assert not pool.asked.is_set()
        if how == "asked for":
            box.write("west/stop-x-1", {})
        else:
            box.delete("west/order-x-1")
        assert pool.asked.wait(60)


def test_a_delta_that_is_lost_with_its_node_is_an_answer_and_holds_no_other_up(tmp_path):
    def gone() -> Any:
        raise SiloError("ObjectLostError: its node is gone")

    box = Mailbox(str(tmp_path))
    agent = Agent(box, {}, LocalPool, prepare_here, name="west")
    box.write("west/order-x-1", {})
    lost, there = an_answer("a", body=[1.0]), an_answer("b", body=[2.0])
    agent._answers = {"update-x-1-a": replace(lost, body=Held(gone)), "update-x-1-b": there}
    agent._write_answers()
    assert "its node is gone" in str(box.read("west/update-x-1-a"))
    assert box.read("west/update-x-1-b").body.tolist() == [2.0]


def test_who_joined_and_has_no_text_any_more_keeps_nobody_from_starting_again(prepared, tmp_path):
    job = ready_job(prepared, tmp_path, "spec-opt", regions={"mailbox": str(tmp_path / "box")})
    latin = next(source for source in job.sources if source.name == "latin")
    gone = latin.model_copy(update={"name": "gone", "paths": (str(tmp_path / "no" / "*.txt"),), "joined": True})
    grown = job.model_copy(update={"sources": (*job.sources, gone)})
    box = Mailbox(str(tmp_path / "box"))
    agent = Agent(box, {}, LocalPool, prepare_here, name="west")
    said = {"job": grown.model_dump_json(), "first": job.model_dump_json()}
    box.write(RUN, {"run": job.name, "opening": "o", "word": 1, "closed": False} | said)
    agent.look()
    beat = box.read("west/beat")
    assert set(beat["ready"]) == set(SOURCES)
    assert list(beat["failed"]) == ["gone"]
    assert "no file" in str(beat["failed"]["gone"])
    agent.release()
