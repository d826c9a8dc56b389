"""A long run among constant misfortune, and three hundred rounds of peace: nothing is lost, nothing grows."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lives import relive
from nodes import Nodes, cluster_of
from ordeals import compare, smallest
from rich.console import Console
from test_coordinator import ordeal_of, start
from test_nodes import housed
from tiny import SOURCES

from dept_ray.client import Run
from dept_ray.draws import generator

pytestmark = [pytest.mark.ray]
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


KINDS = ("process", "node", "freeze", "notice", "coordinator")


class Misfortune(threading.Thread):
    """A few seconds after all are up something is struck, as a seed decides: all kinds in turn, by chance."""

    def __init__(self, run: Run, nodes: Nodes, every_s: float) -> None:
        super().__init__(daemon=True)
        self.watched, self.nodes, self.every_s = run, nodes, every_s
        self.over = threading.Event()
        self.struck: list[str] = []

    def run(self) -> None:
        draw, deck = generator("misfortune", 0), list[str]()
        while not self.over.wait(self.every_s * (0.5 + draw.random())):
            now = self.watched.status()
            up = sorted(name for name, silo in now.silos.items() if silo.doing == "training" and silo.pid)
            if now.over:
                return
            if len(up) == len(SOURCES):
                deck = deck or [str(kind) for kind in draw.permutation(KINDS)]
                silo = SOURCES[int(draw.integers(len(SOURCES)))]
                self.struck.append(self._strike(deck.pop(), silo, now.pid, now.silos[silo].pid))

    def _strike(self, kind: str, silo: str, coordinator: int, pid: int) -> str:
        act: dict[str, Callable[[], Any]] = {
            "process": lambda: os.kill(pid, signal.SIGKILL),
            "node": lambda: self.nodes.kill(silo),
            "freeze": lambda: self.nodes.freeze(silo, pid),
            "notice": lambda: self.nodes.drain(silo),
            "coordinator": lambda: os.kill(coordinator, signal.SIGKILL),
        }
        with suppress(ProcessLookupError):  # it had just died of the strike before
            act[kind]()
        if kind in ("node", "freeze", "notice"):
            self.nodes.add(silo)
        return kind


@pytest.mark.slow
@pytest.mark.soak
def test_sixty_rounds_with_a_fault_every_few_seconds(prepared, tmp_path, monkeypatch):
    overrides: dict[str, Any] = {
        "rounds": {"total": 60}, "inner": {"local_steps": 40},
        "faults": {"failures": 999, "attempts": 99, "quorum": 0.3, "patience_s": 2, "grace_s": 5,
                   "deadline_floor_s": 20, "deadline_cap_s": 30, "start_timeout_s": 60},
    }  # fmt: skip
    job, began = housed(prepared, tmp_path / "a", "spec-opt", **overrides), time.monotonic()
    with cluster_of(*SOURCES) as nodes:
        run = start(job, {}, monkeypatch, pace_s=0.02)
        fate = Misfortune(run, nodes, every_s=3)
        fate.start()
        run.follow(QUIET)
        fate.over.set()
        took = time.monotonic() - began
        run.kill()
    ordeal = ordeal_of(run, job)
    compare(ordeal, relive(ordeal, housed(prepared, tmp_path / "b", "spec-opt", **overrides), monkeypatch))
    lost = sum(3 - len(record["silos"]) for record in ordeal.rounds)
    lives = (run.folder / "lives").read_text()
    print(
        f"60 rounds in {took:.0f} s, {len(fate.struck)} strikes ({', '.join(fate.struck)}), {lives} lives, {lost} lost"
    )
    assert set(fate.struck) == set(KINDS)


def test_three_hundred_rounds_leave_nothing_behind(prepared, tmp_path, ray_here):
    """Memory and open files of coordinator and silos, and the object store, as a slope over the rounds."""
    job = smallest(prepared, tmp_path, "trim", inner={"local_steps": 3}, rounds={"total": 300})
    run, seen = Run.start(job), list[tuple[float, ...]]()
    names: tuple[str, ...] = ()
    deadline = time.monotonic() + 900
    while not (status := run.status()).over and time.monotonic() < deadline:
        silos = {name: silo.pid for name, silo in sorted(status.silos.items()) if silo.pid}
        if len(silos) == 3 and status.round > 0:
            names = ("coordinator", *silos)
            measured = [each for pid in (status.pid, *silos.values()) for each in held_by(pid)]
            seen.append((status.round, *measured, store_bytes()))
        time.sleep(0.1)
    run.kill()
    assert status.phase == "finished"
    rows = np.array([row for row in seen if row[0] >= 100])
    assert len(rows) > 20
    slopes = 100 * np.polyfit(rows[:, 0], rows[:, 1:], 1)[0]
    told = ", ".join(
        f"{name} {memory / 2**20:+.2f} MiB {files:+.2f} files"
        for name, memory, files in zip(names, slopes[0:-1:2], slopes[1:-1:2], strict=True)
    )
    print(f"in 100 rounds: {told}, object store {slopes[-1] / 2**10:+.1f} KiB")
    # Ray Data itself keeps some 70 kB of each dataset that ever was, and a silo reads one per window: here, 85 rounds.
    assert max(slopes[0:-1:2]) < 2 << 20, told
    grown = rows[:, 2:-1:2].max(axis=0) - rows[0, 2:-1:2]
    assert max(grown) < 12, told  # connections to the processes that read for Ray Data: two each, and they are few
    assert slopes[-1] < 64 << 10


def held_by(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def store_bytes() -> int:
    """What the object stores of all nodes hold."""
    import ray
    from ray._private.internal_api import node_stats

    return sum(
        node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats.object_store_bytes_used
        for node in ray.nodes()
        if node["Alive"]
    )
