"""Nodes come for silos, are lost, taken and replaced, and go: Ray's own autoscaler over fake nodes, and a real run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_nodes import FakeNodes, fake_nodes
from faulty_silo import FaultySilo
from metadata import Metadata, metadata_service
from nodes import until
from ordeals import smallest
from tiny import SOURCES, write_texts

from dept_ray.config import Job
from dept_ray.messages import SiloSpec
from dept_ray.on_ray.cluster import check_room
from dept_ray.on_ray.pool import RayPool
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train

STEPS, PACE_S = 60, 0.02


def on_a_fake_gpu(job: Job, spec: SiloSpec, **more: Any) -> FaultySilo:
    """A silo that holds a GPU of Ray's, and trains on the CPU, for there is no GPU behind it."""
    return FaultySilo({}, f"{job.folder}/notes", True, job, replace(spec, gpu=False), pace_s=PACE_S, **more)


class Tale:
    """What befalls a run, told from round to round; over, it stops the run."""

    def __init__(self, nodes: FakeNodes, pool: RayPool, control: Control, service: Metadata) -> None:
        self.nodes, self.pool, self.control, self.service = nodes, pool, control, service
        self.rounds: list[dict[str, Any]] = []
        self.at: dict[str, float] = {}
        """Seconds from the beginning to each event."""
        self.homes: list[dict[str, list[str]]] = []
        """Nodes by silo, each time that all trained."""
        self.began = time.monotonic()
        self.story = self._story()

    def __call__(self, record: dict[str, Any]) -> None:
        if record["event"] == "round":
            self.rounds.append(record)
            next(self.story, None)

    def _story(self) -> Iterator[None]:
        yield from self._until_all_train("all train")
        self.nodes.kill(killed := self._home("code"))
        yield from self._until_moved("code", killed)
        yield from self._until_all_train("the killed one's silo is back")
        watcher = watch_preemption(self.nodes, self.service, taken := self._home("numbers"))
        while not self.service.asked.acquire(blocking=False):
            yield
        self.service.preempted = True
        yield from self._until_moved("numbers", taken)
        assert watcher.wait(10) == 0
        yield from self._until_all_train("the taken one's silo is back")
        self.control.stop()

    def _until_moved(self, silo: str, node: str) -> Iterator[None]:
        while self._home(silo) in (node, "") or node in self.nodes.alive().get(silo, ()):
            yield

    def _until_all_train(self, event: str) -> Iterator[None]:
        while sorted(self.rounds[-1]["silos"]) != list(SOURCES):
            yield
        self.at[event] = time.monotonic() - self.began
        self.homes.append(self.nodes.alive())

    def _home(self, silo: str) -> str:
        return self.pool.statuses()[silo].node


def watch_preemption(nodes: FakeNodes, service: Metadata, node: str) -> subprocess.Popen[str]:
    """What a cluster file starts on a node."""
    words = ["--cloud", "gcp", "--address", nodes.address, "--node", node, "--metadata", service.url]
    return subprocess.Popen([sys.executable, "-m", "dept_ray", "watch-preemption", *words], text=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_grows_with_its_silos_replaces_what_it_loses_and_shrinks(prepared: Path, tmp_path: Path) -> None:
    """It begins with one node of three; one is killed, one is taken with notice; at the end all are gone."""
    import faulty_silo
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(faulty_silo)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    tables = [
        {**table, "resources": {"num_gpus": 1, "labels": {"silo": table["name"]}}}
        for table in write_texts(prepared / "text")
    ]
    job = smallest(
        prepared, tmp_path / "run", "spec", sources=tables, rounds={"total": 150}, inner={"local_steps": STEPS},
        faults={"patience_s": 1},
    )  # fmt: skip
    with fake_nodes(tmp_path, SOURCES) as nodes, metadata_service() as service:
        nodes.ask_for("latin")
        assert set(nodes.alive()) == {"latin"}
        check_room(job)  # what is not there yet may come
        pool, control = RayPool(make=on_a_fake_gpu), Control()
        tale = Tale(nodes, pool, control, service)
        try:
            state = train(job, pool, RunStore(job), tale, control)
        finally:
            pool.close()
        over = time.monotonic()
        until(lambda: not nodes.alive(), 60)
        tale.at["shrunk, after the end"] = time.monotonic() - over
    print({event: round(seconds, 1) for event, seconds in tale.at.items()}, f"{len(tale.rounds)} rounds")
    grown, mended, moved = tale.homes
    assert state.silos["latin"].rounds == len(tale.rounds), "who has a node waits for nobody"
    for homes in tale.homes:
        assert sorted(map(len, homes.values())) == [1, 1, 1], "a node each, and none that nobody asked for"
    assert [silo for silo in SOURCES if grown[silo] != mended[silo]] == ["code"]
    assert [silo for silo in SOURCES if mended[silo] != moved[silo]] == ["numbers"]
    assert not any("numbers" in record["refused"] for record in tale.rounds), "who is told to go hands in"
