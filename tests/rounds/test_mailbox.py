"""`MailboxPool` keeps the contract of all pools, over letters in a folder and two agents that share nothing else."""

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import contract
import pytest
from contract import Harness, PoolContract
from faulty_silo import FaultySilo, Moment
from ordeals import smallest
from test_local_pool import MortalPool
from tiny import tiny_job

from dept_ray.config import Job
from dept_ray.rounds.agent import Agent, prepare_here
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.mailbox import MailboxPool
from dept_ray.text.prepare import global_tokenizer_folder

LOOK_S = 0.01
HERE = ("code", "dialect")
"""The silos of one region; the other has the rest."""


@pytest.fixture
def harness(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    """Every job names a mailbox, and a tokenizer that exists where it needs one for all."""
    box, over = tmp_path / "mailbox", threading.Event()
    agents: list[threading.Thread] = []
    tokenizer = {"kind": "file", "name": str(global_tokenizer_folder(tiny_job(prepared, "glob")) / "tokenizer.json")}

    def job_of(prepared: Path, folder: Path, method: str, **more: Any) -> Job:
        regions = {"mailbox": str(box), "look_every_s": LOOK_S, "silent_s": 30.0}
        return smallest(prepared, folder, method, regions=regions,
                        tokenizer={} if method == "spec-opt" else tokenizer, **more)  # fmt: skip

    def serve(name: str, mine: bool, make: Any) -> None:
        agent = Agent(Mailbox(str(box)), {}, make, prepare_here, name=name,
                      serves=lambda job, silo: (silo in HERE) == mine)  # fmt: skip
        agent.settings = agent.settings.model_copy(update={"look_every_s": LOOK_S})
        while not over.is_set() and not agent.look():
            over.wait(LOOK_S)
        agent.release()

    def make(plan: Mapping[Moment, str], notes: Path) -> MailboxPool:
        pool = partial(MortalPool, partial(FaultySilo, plan, str(notes), False))
        for name, mine in (("here", True), ("there", False)):
            agents.append(threading.Thread(target=serve, args=(name, mine, pool), daemon=True))
            agents[-1].start()
        return MailboxPool()

    monkeypatch.setattr(contract, "smallest", job_of)
    yield Harness(make)
    over.set()
    for agent in agents:
        agent.join()
    assert [name for name in Mailbox(str(box)).names() if name != "run"] == []


class TestMailboxPool(PoolContract):
    """Behind walls."""
