"""How soon something happens: `dept-ray --help`, and the first optimizer step of `dept-ray train` on prepared text.

Help is counted in CPU seconds beside an interpreter that does nothing; the first step in seconds on the wall beside
one that imports what training needs (torch and Ray), for the disk and the cores decide both. The first step is made
when the snapshot that follows it is on disk. Where it is compiled, all that was compiled before is on disk too.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from reference import SIZES, job_of
from sides import Figures, Ratio, options, say, tell, timed_command

from dept_ray.config import Job
from dept_ray.preparing import prepare

DEPT_RAY = [sys.executable, "-m", "dept_ray"]
HELP_CPU_S, FIRST_STEP_S = 0.3, 12.0


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """Help, and the first step; at full size with one silo and with four, as it is and compiled."""
    yield of_help(asked.repeats)
    full = asked.size == "full"
    for compiled, silos in itertools.product((False, True), (1, 4)) if full else [(False, 1)]:
        yield of_first_step(asked, silos, compiled)


def of_help(repeats: int) -> Ratio:
    """CPU seconds of help over those of nothing."""
    ours, nothing = in_turns(
        repeats * 3,
        lambda: timed_command([*DEPT_RAY, "--help"]),
        lambda: timed_command([sys.executable, "-c", "pass"]),
    )
    value = median(ours, "cpu_s")
    return Ratio(
        "help", "CPU seconds of dept-ray --help / of python -c pass", value / max(median(nothing, "cpu_s"), 1e-3),
        f"< {HELP_CPU_S} s of CPU", value < HELP_CPU_S,
        {"CPU seconds": round(value, 3), "of python -c pass": round(median(nothing, "cpu_s"), 3)},
    )  # fmt: skip


def of_first_step(asked: argparse.Namespace, silos: int, compiled: bool) -> Ratio:
    """Seconds to the first step over those of the imports."""
    size = SIZES[asked.size]
    make: Callable[[], Job] = lambda: job_of(  # noqa: E731 - a run's name is used once
        size, asked.folder, f"start-{uuid.uuid4().hex[:8]}", silos, steps=1,
        inner={"compile": "always" if compiled else "never"}, rounds={"total": 1},
    )  # fmt: skip
    prepare(make(), local=True)
    if compiled:
        first_step(make(), asked.folder)  # which leaves on disk what it compiles
    ours, imports = in_turns(
        asked.repeats,
        lambda: first_step(make(), asked.folder),
        lambda: timed_command([sys.executable, "-c", "import torch, ray"]),
    )
    value = median(ours, "seconds")
    return Ratio(
        f"first step, {silos} silo{'s' * (silos > 1)}{', compiled' * compiled}",
        "seconds from dept-ray train to the first optimizer step / of import torch, ray",
        value / median(imports, "seconds"), f"< {FIRST_STEP_S:g} s", value < FIRST_STEP_S,
        {"seconds": [figures["seconds"] for figures in ours],
         "CPU seconds of command, Ray and silos": [figures["cpu_s"] for figures in ours],
         "seconds of the imports": [round(figures["seconds"], 2) for figures in imports], "cores": os.cpu_count()},
    )  # fmt: skip


def first_step(job: Job, folder: Path) -> Figures:
    """From the command to a silo's first snapshot; the command then ends by itself."""
    file = folder / f"{job.name}.toml"
    file.write_text(as_toml(job))
    snapshots = folder / "silos" / job.name
    before, began = os.times(), time.time()
    process = subprocess.Popen([*DEPT_RAY, "train", str(file)], stdout=subprocess.DEVNULL)
    made: list[Path] = []
    while not made and process.poll() is None:
        time.sleep(0.02)
        made = list(snapshots.glob("*/*/state.json"))
    if not made:
        raise SystemExit(f"dept-ray train ended with {process.returncode} before a step was made: see above")
    seconds = min(path.stat().st_mtime for path in made) - began
    process.wait()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 2), "cpu_s": round(cpu, 1)}


def as_toml(job: Job) -> str:
    """The job as a file that `dept-ray` reads."""
    import json

    def line(key: str, value: object) -> str:
        return f"{key} = {json.dumps(value)}\n"

    values = job.model_dump(mode="json", exclude_unset=True)
    text = "".join(line(key, value) for key, value in values.items() if isinstance(value, str | int))
    for key, value in values.items():
        if isinstance(value, dict):
            text += f"[{key}]\n" + "".join(line(*item) for item in value.items())
    for source in values["sources"]:
        text += "[[sources]]\n" + "".join(line(*item) for item in source.items())
    return text


def in_turns(repeats: int, *sides: Callable[[], Figures]) -> list[list[Figures]]:
    """Figures of each side, measured A B A B."""
    figures: list[list[Figures]] = [[] for _ in sides]
    for _ in range(repeats):
        for of_side, measure in zip(figures, sides, strict=True):
            of_side.append(measure())
            say(str(of_side[-1]))
    return figures


def median(figures: list[Figures], key: str) -> float:
    """Of one figure over all measurements."""
    return statistics.median(each[key] for each in figures)


if __name__ == "__main__":
    tell(options(__doc__ or "", repeats=3).parse_args(sys.argv[1:]), bench)
