"""What a coordinator costs: the pause between two rounds, and how it grows with silos.

The pause is from the last silo's answer to the moment at which the last silo begins the next round's first step: the
verdict, the mean, the outer step, the orders, and the silos' own taking up of the body. It is held against copying the
body once per silo, in one process, by one thread. The commit to disk comes after, while silos train.
"""

import argparse
import itertools
import json
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import SIZES, job_of
from sides import Ratio, options, say, tell

from dept_ray.config import Job
from dept_ray.messages import Held, RoundOrder, SiloUpdate
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.outer import outer_step
from dept_ray.rounds.pool import nothing
from dept_ray.rounds.state import RunState, SiloRecord
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.memory import keep_freed_memory
from dept_ray.silo.silo import Silo

LAYERS = {"full": 18, "small": 1}
"""At width 768 a body of 128M parameters."""
SILOS = 4
MANY = {"full": (10, 1000, 1 << 20), "small": (2, 10, 1 << 10)}
"""Few silos, many silos, values of a body."""


class NotingSilo(Silo):
    """Writes down when it is ordered, when it begins its first step, and when it has answered."""

    def __init__(self, job: Job, *more: Any, **named: Any) -> None:
        super().__init__(job, *more, **named)
        self.notes = Path(job.folder) / f"notes-{self.spec.silo}"
        batches = self.stream.batches

        def noted(*asked: Any) -> Iterator[np.ndarray]:
            self.note("begins")
            yield from batches(*asked)

        self.stream.batches = noted

    def obey(self, order: RoundOrder) -> SiloUpdate:
        self.round = order.round
        self.note("ordered")
        update = super().obey(order)
        self.note("answers")
        return update

    def note(self, what: str) -> None:
        with open(self.notes, "a") as file:
            file.write(json.dumps([self.round, what, time.time()]) + "\n")


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """Two ratios."""
    keep_freed_memory()  # as a coordinator's own process does
    yield pause(asked)
    yield growth(*MANY[asked.size])


def pause(asked: argparse.Namespace) -> Ratio:
    """Seconds between two rounds on Ray, over those of copying the body once per silo."""
    from dept_ray.on_ray.cluster import connect
    from dept_ray.on_ray.pool import RayPool

    full = asked.size == "full"
    job = job_of(
        SIZES["small"], asked.folder, f"bench-{uuid.uuid4().hex[:8]}", SILOS, 1,
        model={"layers": LAYERS[asked.size], "width": 768 if full else 32, "heads": 12 if full else 2},
        rounds={"total": asked.repeats + 2, "score_every": 0},
    )  # fmt: skip
    for left in asked.folder.glob("notes-*"):
        left.unlink()
    prepare(job, local=True)
    connect(None, silos=SILOS)
    pool, store = RayPool(make=NotingSilo), RunStore(job)
    run_round, arrived = pool.run_round, dict[int, float]()

    def noted(orders: Any, deadline: Any, meanwhile: Any = nothing) -> Any:
        answers = run_round(orders, deadline, meanwhile)
        arrived[next(iter(orders.values())).round] = time.time()
        return answers

    pool.run_round = noted
    try:
        state = train(job, pool, store, lambda record: say(f"round {record['round']}"), Control())
    finally:
        pool.close()
    assert state.body is not None
    rounds = range(1, asked.repeats + 1)  # the first round's is a warm-up
    moments = [
        (
            noted_at(asked.folder, n, "answers"),
            arrived[n],
            noted_at(asked.folder, n + 1, "ordered"),
            noted_at(asked.folder, n + 1, "begins"),
        )
        for n in rounds
    ]
    pauses = [last - first for first, *_, last in moments]
    copies = [copying(state.body.numpy(), SILOS) for _ in range(max(3, asked.repeats))]
    ratio = statistics.median(pauses) / statistics.median(copies)
    return Ratio(
        "coordinator, pause",
        f"seconds from the last answer to the next round's first step, {SILOS} silos / of copying the body as often",
        ratio,
        "<= 3",
        ratio <= 3,
        {
            "pauses, s": [round(each, 3) for each in pauses],
            "of which on the way, verdict and outer step and orders, taking up": [
                [round(b - a, 3) for a, b in itertools.pairwise(each)] for each in moments
            ],
            "copies, s": [round(each, 3) for each in copies],
            "body": f"{state.body.numel() / 1e6:.1f}M parameters",
        },
    )


def noted_at(folder: Path, round: int, what: str) -> float:
    """When the last silo did something in a round."""
    notes = [json.loads(line) for file in folder.glob("notes-*") for line in file.read_text().splitlines()]
    return max(at for number, did, at in notes if (number, did) == (round, what))


def copying(body: np.ndarray, times: int) -> float:
    """Seconds of copying into memory that is there already."""
    target = np.zeros_like(body)
    began = time.perf_counter()
    for _ in range(times):
        np.copyto(target, body)
    return time.perf_counter() - began


def growth(few: int, many: int, length: int) -> Ratio:
    """Seconds per silo of an outer step over many silos, over those with few; both with deltas made when fetched."""
    job = job_of(SIZES["small"], Path(), "growth", 1, 1, outer={"preset": "nesterov"})
    delta = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    fold(job, few, delta)
    begun = peak_mib()
    seconds = {count: [fold(job, count, delta) for _ in range(3)] for count in (few, many)}
    each = {count: statistics.median(took) / count for count, took in seconds.items()}
    body_mib = 4 * length / 2**20
    return Ratio(
        "coordinator, growth",
        f"seconds per silo of an outer step over {many} silos / over {few}",
        each[many] / each[few],
        "<= 1",
        each[many] <= each[few],
        {
            "ms per silo": {count: round(1000 * s, 3) for count, s in each.items()},
            "body": f"{body_mib:.1f} MiB",
            "peak memory, bodies more than before": round((peak_mib() - begun) / body_mib, 1),
        },
    )


def fold(job: Job, silos: int, delta: np.ndarray) -> float:
    """Seconds of an outer step."""
    nobody = SiloUpdate("growth", "", 0, 0, "", 1, 1, {}, "", 1.0, body=Held(partial(np.copy, delta)))
    answers = {name: replace(nobody, silo=name) for name in (f"s{i:04d}" for i in range(silos))}
    state = RunState(0, {name: SiloRecord(position={}) for name in answers}, torch.zeros(len(delta)))
    began = time.perf_counter()
    outer_step(job, state, answers, {})
    return time.perf_counter() - began


def peak_mib() -> float:
    """Resident memory of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    tell(options(__doc__ or "", repeats=3).parse_args(sys.argv[1:]), bench)
