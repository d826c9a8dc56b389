"""What a round costs on the wire, counted by the kernel: a program for a network namespace of its own.

Each silo is on a node of its own, the coordinator on another, all on this namespace's loopback, which nobody else uses.
Prints, per round, what the ledger says and what went over the interface, less what Ray says to itself in as long
a time without a round, as JSON. Arguments: folder, method, codec, layers. Needs tests/ and tests/on_ray/ on its path.
"""

import itertools
import json
import sys
import time
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
    """Bytes that came over loopback since this namespace began."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


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
    seen: list[tuple[int, float]] = []
    records: list[dict[str, Any]] = []
    with cluster_of(*SOURCES, store_bytes=400 << 20):
        pool = RayPool()
        run_round = pool.run_round

        def noted(*more: Any) -> Any:
            answers = run_round(*more)
            seen.append((counted(), time.monotonic()))  # all have arrived, and the next orders are not out yet
            return answers

        pool.run_round = noted
        try:
            train(job, pool, RunStore(job), Log(records.append), Control())
            before = counted()
            time.sleep(5)
            idle = (counted() - before) / 5
        finally:
            pool.close()
    rounds = [record for record in records if record["event"] == "round"]
    costs = plan_job(job)
    print(json.dumps({
        "planned": costs.round_bytes_down + costs.round_bytes_up,
        "ledger": [sum(record["sent_bytes"].values()) for record in rounds][1:],
        "counted": [int(n - m - idle * (t - s)) for (m, s), (n, t) in itertools.pairwise(seen[: len(rounds)])],
        "idle": idle,
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
