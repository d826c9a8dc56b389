"""Nodes are killed, frozen, told to go, and run out of memory; silos live on where there is room. Nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from contract import Harness, endure_once
from faulty_silo import FaultySilo
from lives import relive
from nodes import cluster_of, until
from ordeals import compare, lost_of, smallest
from rich.console import Console
from tiny import SOURCES, write_texts

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import load_round
from dept_ray.rounds.pool import LocalPool
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train

pytestmark = [pytest.mark.ray]
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


STEPS = 120


def housed(prepared: Path, folder: Path, method: str, **overrides: Any) -> Job:
    """A smallest job each of whose silos lives on its own node; rounds long enough to be struck in their middle."""
    tables = [{**t, "resources": {"labels": {"silo": t["name"]}}} for t in write_texts(prepared / "text")]
    inner = {"local_steps": STEPS, "optimizer_state": "keep", **overrides.pop("inner", {})}
    return smallest(prepared, folder, method, sources=tables, inner=inner, **overrides)


def parent_of(pid: int) -> int:
    """Of a process of Ray: its node."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def a_pool_of(plan: dict[tuple[int, int, str], str], notes: Path) -> Any:
    import faulty_silo
    import ray.cloudpickle

    from dept_ray.on_ray.pool import RayPool

    ray.cloudpickle.register_pickle_by_value(faulty_silo)
    return RayPool(make=partial(FaultySilo, plan, str(notes), True, pace_s=0.02))


class Fate(threading.Thread):
    """Strikes when a silo trains in a round, each time once."""

    def __init__(self, strikes: dict[tuple[int, str], Callable[[Any], None]]) -> None:
        super().__init__(daemon=True)
        self.strikes, self.pool = strikes, None
        self.nodes: dict[tuple[int, str], str] = {}
        """Where silos were when they trained in a round."""

    def watched(self, plan: dict[tuple[int, int, str], str], notes: Path) -> Any:
        self.pool = a_pool_of(plan, notes)
        self.start()
        return self.pool

    def run(self) -> None:
        while self.strikes:
            for name, status in self.pool.statuses().items() if self.pool else ():
                if status.doing == "training" and status.node:
                    self.nodes[status.round, name] = status.node
                    if strike := self.strikes.pop((status.round, name), None):
                        strike(status)
            time.sleep(0.02)


def test_nodes_die_freeze_and_leave_and_silos_train_for_long(prepared, tmp_path, monkeypatch):
    """One run through it all: a node is killed, one freezes, one is told to go, and a silo is deaf for longer than any
    health check, which is no death."""
    with cluster_of(*SOURCES) as nodes:

        def then_another(silo: str, strike: Callable[[], Any]) -> None:
            strike()
            nodes.add(silo)

        strikes: dict[tuple[int, str], Callable[[Any], None]] = {
            (1, "latin"): lambda status: then_another("latin", lambda: nodes.kill("latin")),
            (3, "code"): lambda status: then_another("code", lambda: nodes.freeze("code", status.pid)),
            (5, "numbers"): lambda status: then_another("numbers", lambda: nodes.drain("numbers")),
            (7, "numbers"): lambda status: None,
        }
        fate, plan = Fate(strikes), {(2, 0, "numbers"): "deaf"}
        overrides = {"rounds": {"total": 8}, "faults": {"patience_s": 60, "grace_s": 30, "attempts": 3, "failures": 9}}
        ordeal = endure_once(Harness(fate.watched), housed(prepared, tmp_path / "a", "trim", **overrides), plan)
    ordeal.lost = lost_of(ordeal.records)
    compare(ordeal, relive(ordeal, housed(prepared, tmp_path / "b", "trim", **overrides), monkeypatch))
    rounds = ordeal.rounds
    # Who was made anew has missed the round, or taken its order again, if it was there before the others were done.
    again = [[name for name, silo in r["silos"].items() if "lost" in silo] for r in rounds]
    missed = [list(r["refused"]) for r in rounds]
    assert [a + m for a, m in zip(again, missed, strict=True)] == [[], ["latin"], [], ["code"], [], [], [], []]
    assert [sorted(r["silos"]) == list(SOURCES) for r in rounds] == [not names for names in missed]
    assert rounds[2]["silos"]["numbers"]["steps"] == STEPS
    assert 0 < rounds[5]["silos"]["numbers"]["steps"] < STEPS  # it handed in what it had when it was told to go
    assert fate.nodes[5, "numbers"] != fate.nodes[7, "numbers"]
    struck = [rounds[i]["seconds"] for i in (1, 3, 5)]
    print(f"seconds of the rounds in which a node was killed, frozen, drained: {struck}")


def test_a_silo_that_eats_all_memory_is_killed_alone_and_made_anew(prepared, tmp_path, monkeypatch):
    def bytes_of(what: str) -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10

    with cluster_of("latin", "numbers") as nodes:
        total, room = bytes_of("MemTotal"), 4 << 30  # a silo and the tasks that read for it take less than one
        limit = (total - bytes_of("MemAvailable") + room) / total
        watch = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "50"}
        nodes.add("code", env_vars=watch)
        nodes.cluster.wait_for_nodes()
        plan = {(1, 0, "code"): "starves"}
        overrides = {"rounds": {"total": 3}, "inner": {"local_steps": 3}, "faults": {"patience_s": 60}}
        ordeal = endure_once(Harness(a_pool_of), housed(prepared, tmp_path / "a", "spec", **overrides), plan)
    ordeal.lost = lost_of(ordeal.records)
    compare(ordeal, relive(ordeal, housed(prepared, tmp_path / "b", "spec", **overrides), monkeypatch))
    assert [sorted(r["silos"]) == list(SOURCES) for r in ordeal.rounds] == [True, False, True]
    assert "memory" in ordeal.rounds[1]["refused"]["code"].lower(), ordeal.rounds[1]["refused"]


def test_a_silo_without_a_node_holds_nobody_up_and_joins_when_its_node_comes(prepared, tmp_path):
    job = housed(prepared, tmp_path, "spec", rounds={"total": 999}, faults={"patience_s": 3})
    control, present = Control(), list[bool]()

    def watch(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            present.append("code" in record["silos"])
            if present[-1]:
                control.stop()

    with cluster_of("latin", "numbers") as nodes:
        fate = Fate({(1, "latin"): lambda status: nodes.add("code")})
        pool = fate.watched({}, tmp_path / "notes")
        state = train(job, pool, RunStore(job), watch, control)
        pool.close()
    assert present[:2] == [False, False]
    assert present[-1]
    assert (state.silos["code"].rounds, state.silos["latin"].rounds) == (sum(present), len(present))


LOST_LATER = """
import sys, time
from nodes import cluster_of, until
from tiny import SOURCES
from dept_ray.client import Run
from dept_ray.jobfile import parse_job
import json

with cluster_of(*SOURCES):
    run = Run.start(parse_job(json.loads(sys.stdin.read())))
    time.sleep(600)
"""


def test_the_coordinator_is_started_where_its_folder_is_and_nowhere_else(prepared, tmp_path):
    """Of four nodes always on the one of who started the run; and it does not begin anew where there is no folder."""
    with cluster_of(*SOURCES) as nodes:
        head = nodes.cluster.head_node.all_processes["raylet"][0].process.pid
        run = Run.start(housed(prepared, tmp_path, "spec", rounds={"total": 999}))
        for _ in range(4):
            until(lambda: run.status().phase == "training")
            pid = run.status().pid
            assert parent_of(pid) == head
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: run.status().pid != pid)
        until(lambda: run.status().phase == "training")
        run.folder.rename(tmp_path / "on the disk of a node that is gone")
        os.kill(run.status().pid, signal.SIGKILL)
        until(lambda: run.status().phase == "failed")
        assert f"run folder {run.folder} is not on the node" in run.status().error
        run.kill()
    assert not run.folder.exists()


def test_silos_that_ask_for_nothing_are_spread_over_cores(prepared, tmp_path):
    """By Ray's own choice, which is by chance, all of them may be on one node."""
    with cluster_of("a", "b", "c"):
        run = Run.start(smallest(prepared, tmp_path, "spec", rounds={"total": 999}))
        until(lambda: sum(silo.node != "" for silo in run.status().silos.values()) == 3)
        taken = Counter(silo.node for silo in run.status().silos.values())
        cores = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes()}
        run.kill()
    assert all(taken[node] <= cores[node] for node in taken), (taken, cores)


def test_the_head_is_lost_and_the_run_goes_on_on_another_cluster(prepared, tmp_path):
    """Everything is killed at once, head, nodes, coordinator and silos; all that is needed is the run's folder."""
    overrides = {"rounds": {"total": 12}}
    job = housed(prepared, tmp_path / "a", "spec-opt", **overrides)
    here = Harness(lambda plan, notes: LocalPool())
    expected = endure_once(here, housed(prepared, tmp_path / "b", "spec-opt", **overrides), {})
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    child = subprocess.Popen(
        [sys.executable, "-c", LOST_LATER], stdin=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(job.model_dump_json(exclude_none=True))
    child.stdin.close()
    store = RunStore(job)
    until(lambda: child.poll() is not None or any(round >= 2 for round in store.rounds()))
    assert child.poll() is None
    for pid in subprocess.run(["pgrep", "-s", str(child.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    child.wait()
    assert store.rounds()[-1] < 12
    with cluster_of(*SOURCES):
        records = Run.start(job).follow(QUIET)
    assert [r["loss"] for r in records if r["event"] == "round"] == [r["loss"] for r in expected.rounds]
    assert torch.equal(load_round(store.folder, 12)[0].body, expected.state.body)
