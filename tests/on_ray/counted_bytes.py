"""What a round costs on the wire, counted by the kernel: a program for a network namespace of its own.

Each silo is on a node of its own, the coordinator on another, all on this namespace's loopback, which nobody else uses.
Prints, per round, what the ledger says and what the sockets between the nodes, the silos and the coordinator sent, as
JSON. What Ray's own services (its store of facts, its dashboards, its statistics) say is not a round's: it comes in
bursts of up to 2 MB a round, however large the body is, and whoever counts the interface counts it too.
Arguments: folder, method, codec, layers. Needs tests/ and tests/on_ray/ on its path.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from nodes import cluster_of
from tiny import SOURCES, ready_job, tiny_job

from dept_ray.metrics import Log
from dept_ray.on_ray.pool import RayPool
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.study.plan import plan_job


def counted() -> int:
    """Bytes that the sockets between raylets, silos and this process, the coordinator, have sent since they opened."""
    listed = subprocess.run(["ss", "-tinpHO"], check=True, capture_output=True, text=True).stdout
    sent: dict[tuple[str, str], int] = {}
    carries: set[str] = set()
    for line in listed.splitlines():
        _, _, _, here, there, *_ = line.split()
        owner, amount = re.search(r'users:\(\("([^"]+)",pid=(\d+)', line), re.search(r"bytes_sent:(\d+)", line)
        if owner and (owner[1].startswith(("raylet", "ray::SiloActor")) or int(owner[2]) == os.getpid()):
            carries.add(here)
        sent[here, there] = int(amount[1]) if amount else 0
    return sum(amount for ends, amount in sent.items() if carries.issuperset(ends))


def main(folder: Path, method: str, codec: str, layers: int) -> None:
    change: dict[str, Any] = {
        "model": {"layers": layers, "width": 512, "heads": 8},
        "inner": {"local_steps": 1, "batch_size": 2, "context": 16, "compile": "never"},
        "rounds": {"total": 3, "score_every": 0},
        "wire": {"codec": codec},
    }
    prepare(tiny_job(folder, method), local=True)
    job = ready_job(folder, folder / "run", method, **change)
    sources = tuple(
        source.model_copy(update={"resources": job.resources.model_copy(update={"labels": {"silo": source.name}})})
        for source in job.sources
    )
    job = job.model_copy(update={"sources": sources})
    seen: list[int] = []
    records: list[dict[str, Any]] = []
    with cluster_of(*SOURCES, store_bytes=400 << 20):
        pool = RayPool()
        run_round = pool.run_round

        def noted(*more: Any) -> Any:
            answers = run_round(*more)
            seen.append(counted())  # all have arrived, and the next orders are not out yet
            return answers

        pool.run_round = noted
        try:
            train(job, pool, RunStore(job), Log(records.append), Control())
        finally:
            pool.close()
    rounds = [record for record in records if record["event"] == "round"]
    costs = plan_job(job)
    print(json.dumps({
        "planned": costs.round_bytes_down + costs.round_bytes_up,
        "ledger": [sum(record["sent_bytes"].values()) for record in rounds][1:],
        "counted": [after - before for before, after in itertools.pairwise(seen[: len(rounds)])],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
