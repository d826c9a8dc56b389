"""A real run on Ray, held between its rounds: each measurement lets one round through. A side; it is no benchmark.

What is counted is from the request for a round to its manifest on disk, so all that a round costs is in it: orders,
training, snapshots, answers, the outer step, the commit. What a crash costs is `ray_crash`'s to measure.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from reference import SIZES, job_of
from sides import SPEED, Figures, Ready, serve

from dept_ray.client import Run
from dept_ray.config import Job

WARM_ROUNDS = 2
"""Rounds before the first measurement: compilation, the first window of text, the first outer step."""


def get_ready(job: Job) -> Ready:
    """Start the run and let its first rounds through."""
    began = time.perf_counter()
    run = Run.start(job)
    run.pause()
    one_round(run)
    first = time.perf_counter() - began
    for _ in range(WARM_ROUNDS - 1):
        one_round(run)
    about = {"first_round_s": round(first, 1), "silos": run.status().hardware}

    def measure() -> Figures:
        seconds, cpu_s = one_round(run)
        record = run.history()[-1]
        parts = [silo["seconds"] for silo in record["silos"].values()]
        tokens = sum(silo["tokens"] for silo in record["silos"].values())
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 3),
            "cpu_s": round(cpu_s, 2),
            **{f"{key}_s": round(statistics.fmean(part[key] for part in parts), 3) for key in parts[0]},
            "sent_bytes": sum(record["sent_bytes"].values()),
            "silo_mib": sum(peak_mib(silo.pid) for silo in run.status().silos.values()),
            "loss": round(record["loss"], 3),
        }

    def crash() -> Figures:
        from ray_crash import measure_crash  # only now: it imports what silos import, and that is timed above

        return measure_crash(run)

    return about, {SPEED: measure, "crash": crash}


def one_round(run: Run) -> tuple[float, float]:
    """Let one round through; seconds until it is on disk, and CPU seconds of the silos meanwhile."""
    number = max((record["round"] for record in run.history()), default=0) + 1
    manifest = run.folder / "rounds" / f"{number:06d}" / "manifest.json"
    pids = [silo.pid for silo in run.status().silos.values() if silo.pid]
    before, began = sum(map(cpu_seconds, pids)), time.time()
    run.step(1)
    while not manifest.exists():
        time.sleep(0.05)
        if (status := run.status() if time.time() - began > 600 else None) and status.phase == "failed":
            raise SystemExit(status.error)
    seconds = manifest.stat().st_mtime - began
    while len(run.history()) < number:  # the record is written after the fact
        time.sleep(0.05)
    return seconds, sum(map(cpu_seconds, pids)) - before


def cpu_seconds(pid: int) -> float:
    """Of a process so far."""
    fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> int:
    """Resident memory of a process at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--silos", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--method", default="spec-opt")
    parser.add_argument("--outer", default="average")
    asked = parser.parse_args(sys.argv[1:])
    job = job_of(
        SIZES[asked.size], asked.folder, asked.name, asked.silos, asked.steps, method=asked.method,
        outer={"preset": asked.outer},
    )  # fmt: skip
    serve(lambda: get_ready(job))
