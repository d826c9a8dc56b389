"""What a silo that joins a run gains from warm rows, and what its coming costs the others.

SPEC-OPT on three sources; after half of the rounds a fourth joins, as somebody's `dept-ray add` would let it, once for
each way of `faults.newcomer_rows`, at first with the body frozen or not. All branches of a seed go on from one and the
same run, which also goes on without a newcomer: what the others lose is told against that. A ratio is of steps: those
until the newcomer's held-out loss is what rows that are drawn lead to in the end, over all steps there are; inf where
it never is. One process, one thread; the text is what is installed, or `--text FOLDER --sources A B C NEWCOMER`, with
train.parquet and validation.parquet in a folder of each name.
"""

import argparse
import math
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference import Size, job_of
from sides import Ratio, options, say, tell

from dept_ray.config import Job
from dept_ray.in_process import train_here
from dept_ray.metrics import Record, read_records
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.silo.warmstart import WAYS
from dept_ray.study.plasticity import curve, steps_to

SIZES = {
    "full": Size(2, 64, 4, 64, 1024, 8, text_bytes=500_000, steps=20, compile=False),
    "small": Size(1, 32, 2, 32, 300, 2, text_bytes=60_000, steps=2, compile=False),
}
ROUNDS = {"full": 10, "small": 2}
"""Before somebody joins, and as many after."""
INSTALLED = ("cpp", "maths", "python", "docs")
RANDOM = "random"


@dataclass(frozen=True)
class Branch:
    """One way to join."""

    rows: str
    frozen_steps: int

    def __str__(self) -> str:
        return self.rows + (f", body frozen for {self.frozen_steps} steps" if self.frozen_steps else "")


@dataclass(frozen=True)
class Course:
    """What became of a branch in one seed, from the moment at which somebody joined."""

    newcomer: list[tuple[int, float]]
    """Bits per byte of its held-out text, by steps since."""
    others: dict[int, float]
    """Of theirs, the mean over sources, by steps since."""


def sources_of(asked: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """The `[[sources]]`; the last one joins."""
    capped = {"max_bytes": size.text_bytes, "max_validation_bytes": size.text_bytes // 50}
    if asked.text is None:
        return [{"name": name, "kind": "installed", "collection": name, **capped} for name in INSTALLED]
    return [
        {
            "name": name, "kind": "files", "paths": str(asked.text / name / "train.parquet"),
            "validation_paths": str(asked.text / name / "validation.parquet"), **capped,
        }
        for name in asked.sources
    ]  # fmt: skip


def a_job(asked: argparse.Namespace, folder: Path, seed: int, num_sources: int, **faults: Any) -> Job:
    """The run in some folder, of the first sources."""
    size = SIZES[asked.size]
    return job_of(
        size, folder, "joining", num_sources, size.steps, seed=seed, sources=sources_of(asked, size)[:num_sources],
        inner={"lr": 3e-3, "warmup_steps": 20, "optimizer_state": "keep", "precision": "fp32", "threads": 1},
        rounds={"total": 2 * ROUNDS[asked.size], "score_every": 1, "keep": 1}, faults=faults,
    )  # fmt: skip


def begun(asked: argparse.Namespace, seed: int) -> Path:
    """The folder of a run that has half of its rounds behind it; it is there already, or made."""
    folder, half = asked.folder / f"seed-{seed}", ROUNDS[asked.size]
    data = asked.folder / "data"
    prepare(a_job(asked, asked.folder, seed, 4), local=True)  # the newcomer's text too, once for all branches
    if not (folder / "begun").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "data").symlink_to(data, target_is_directory=True)
        control = Control()

        def stop(record: Record) -> None:
            if record["event"] == "round" and record["round"] == half:
                control.stop()

        train_here(a_job(asked, folder, seed, 3), stop, control=control)
        (folder / "begun").touch()
    return folder


def course(asked: argparse.Namespace, seed: int, branch: Branch | None) -> Course:
    """Let a run go on: with a newcomer or, None, without."""
    origin = begun(asked, seed)
    folder = asked.folder / "branch"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder, symlinks=True)
    control, newcomer = Control(), sources_of(asked, SIZES[asked.size])[-1]
    faults = {"newcomer_rows": branch.rows, "newcomer_steps": branch.frozen_steps} if branch else {}
    if branch:
        control.change({"add": newcomer})
    job = a_job(asked, folder, seed, 3, **faults)
    state = train_here(job, lambda record: None, control=control)
    records, since = read_records(run_folder(job) / "metrics.jsonl"), state.step // 2
    curves = [[(step - since, bits) for step, bits in curve(records, s.name) if step >= since] for s in job.sources]
    others = {points[0][0]: statistics.fmean(bits for _, bits in points) for points in zip(*curves, strict=True)}
    found = [(step - since, bits) for step, bits in curve(records, newcomer["name"])]
    for who, points in (("newcomer", found), ("others", others.items())):
        say(f"seed {seed}, {branch or 'nobody joins'}: {who} {[round(bits, 4) for _, bits in points]}")
    return Course(found, others)


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """A ratio for each way to join, the mean over seeds."""
    steps, seeds = SIZES[asked.size].steps, range(asked.repeats)
    alone = {seed: course(asked, seed, None) for seed in seeds}
    ways = [Branch(rows, frozen) for frozen in (0, steps) for rows in (RANDOM, *WAYS)]
    drawn = dict[int, Course]()
    for branch in ways:
        courses = {seed: course(asked, seed, branch) for seed in seeds}
        drawn = drawn or courses
        whole = drawn[0].newcomer[-1][0]
        reached = [steps_to(courses[seed].newcomer, drawn[seed].newcomer[-1][1]) for seed in seeds]
        harm = [
            {step: 100 * (bits / alone[seed].others[step] - 1) for step, bits in courses[seed].others.items()}
            for seed in seeds
        ]
        yield Ratio(
            f"joining, {branch}",
            f"steps to the loss that rows that are drawn lead to after {whole} steps / {whole}",
            statistics.fmean(math.inf if step is None else step / whole for step in reached),
            "",
            None,
            {
                "of each seed": reached,
                "bits/byte of the newcomer, by steps since it joined": {
                    step: statistics.fmean(dict(courses[seed].newcomer)[step] for seed in seeds)
                    for step, _ in courses[0].newcomer
                },
                "others, % over nobody joining, by steps since": {
                    step: statistics.fmean(each[step] for each in harm) for step in harm[0]
                },
                "at worst, of each seed": [max(each.values()) for each in harm],
                "at the end, of each seed": [each[whole] for each in harm],
            },
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = options(__doc__ or "", repeats=2)
    parser.add_argument("--text", type=Path, help="a folder of folders of parquet files (default: what is installed)")
    parser.add_argument("--sources", nargs=4, help="folders of --text; the last one joins", metavar="NAME")
    given = parser.parse_args()
    if (given.text is None) != (given.sources is None):
        parser.error("--text and --sources go together")
    tell(given, bench)
