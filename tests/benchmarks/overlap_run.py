"""Runs on Ray whose silos are at the far end of a slow line: a program for a network namespace of its own.

Each step of a silo lasts a given time, most of which it sleeps, as if a device of its own computed: what is measured is
what the line costs, not how many cores this machine has, or who else uses them. Head and coordinator are at the near
end, all silos on one node at the far end, so that the line is shared by them. One run waits for its orders, the next
makes steps ahead of them, a third sends int8 and makes fewer of those, and so on in turns; each prints, as JSON, which
share of its time a silo computed, between the first and the last but one time that all answers had arrived.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from reference import SIZES, job_of
from slow_line import SlowLine, slow_line

from dept_ray.config import Job
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.silo import Silo

PORT, PLACE = 6379, {"place": "far"}


class PacedSilo(Silo):
    """Each of its steps lasts `pace_s` and a little more."""

    def __init__(self, pace_s: float, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        batches = self.stream.batches

        def paced(*asked: Any) -> Iterator[np.ndarray]:
            for batch in batches(*asked):
                time.sleep(pace_s)
                yield batch

        self.stream.batches = paced


@contextmanager
def cluster(line: SlowLine) -> Iterator[None]:
    """A head here and a node there, to which this process is connected."""
    import ray

    from dept_ray.on_ray.cluster import connect

    address, store = f"{line.near}:{PORT}", f"--object-store-memory={400 << 20}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", store]
    head = ["--head", f"--port={PORT}", f"--node-ip-address={line.near}", "--num-cpus=1", "--include-dashboard=false"]
    node = [f"--address={address}", f"--node-ip-address={line.other}", "--num-cpus=2", "--labels=place=far"]
    with ExitStack() as stack:

        def begin(command: Sequence[str], there: Callable[[], bool]) -> None:
            started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(started.wait)
            stack.callback(started.terminate)
            while not there():
                if started.poll() is not None:
                    raise SystemExit(f"a node of Ray ended with {started.returncode} as it started: see above")
                time.sleep(0.2)

        begin([*start, *head], lambda: _listens(line.near))
        connect(address)
        begin([*line.far, *start, *node], lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
        yield


def _listens(host: str) -> bool:
    with suppress(OSError), socket.create_connection((host, PORT), timeout=1):
        return True
    return False


def run(job: Job, pace_s: float) -> dict[str, Any]:
    """Train a job, and say what its silos did with their time."""
    from dept_ray.on_ray.pool import RayPool

    pool, records, arrived = RayPool(make=partial(PacedSilo, pace_s)), list[dict[str, Any]](), list[float]()
    run_round = pool.run_round

    def noted(*more: Any) -> Any:
        answers = run_round(*more)
        arrived.append(time.monotonic())
        return answers

    pool.run_round = noted
    try:
        train(job, pool, RunStore(job), records.append, Control())
    finally:
        pool.close()
    rounds = [record for record in records if record["event"] == "round"][1:-1]
    took_s = arrived[len(rounds)] - arrived[0]
    parts: dict[str, list[float]] = {}
    for record in rounds:
        for silo in record["silos"].values():
            for what in ("load", "ahead", "train", "code", "save", "send", "wait"):
                parts.setdefault(what, []).append(silo["seconds"].get(what, 0.0))
    silos = len(rounds[0]["silos"])
    return {
        "ahead": job.inner.ahead_steps,
        "share": (sum(parts["train"]) + sum(parts["ahead"])) / (silos * took_s),
        "round_s": took_s / len(rounds),
        "sent_bytes": sum(rounds[-1]["sent_bytes"].values()),
        "loss": rounds[-1]["loss"],
        **{f"{what}_s": statistics.fmean(seconds) for what, seconds in parts.items()},
    }


def main(asked: argparse.Namespace) -> None:
    def job(ahead: int, codec: str = "fp32") -> Job:
        return job_of(
            SIZES[asked.size], asked.folder, f"overlap-{uuid.uuid4().hex[:8]}", asked.silos, asked.steps,
            inner={"ahead_steps": ahead, "compile": "never", "threads": 1, "batch_size": 1, "context": 32},
            rounds={"total": asked.rounds, "score_every": 0}, resources={"labels": PLACE}, wire={"codec": codec},
        )  # fmt: skip

    prepare(job(0), local=True)
    with slow_line(asked.bits_per_s, asked.round_trip_s) as line, cluster(line):
        for _ in range(asked.repeats):
            for ahead, codec in ((0, "fp32"), (asked.ahead, "fp32"), (asked.ahead_int8, "int8")):
                print(json.dumps({"codec": codec, **run(job(ahead, codec), asked.pace_s)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    for name, kind in (
        ("folder", Path), ("silos", int), ("steps", int), ("ahead", int), ("ahead-int8", int), ("rounds", int),
        ("pace-s", float), ("repeats", int), ("bits-per-s", float), ("round-trip-s", float),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, required=True)
    main(parser.parse_args())
