"""A silo of a run on Ray is killed: what `ray_run` measures when it is asked for a crash. It is no benchmark.

The run that was measured is stopped, and goes on from its last round by the same loop and on the same Ray, in this
process instead of a coordinator's, so that its silos can note their steps. Nothing else is done for it: that one of
them is dead, and what is to be done about it, it finds out by itself.
"""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from crash import kill_one, note_step
from sides import Figures

from dept_ray.client import Run
from dept_ray.metrics import JsonLines, Log, Record
from dept_ray.on_ray.pool import RayPool
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.silo import Silo


class NotingSilo(Silo):
    """Notes each step that it has made."""

    def __init__(self, notes: Path, *more: Any, **named: Any) -> None:
        super().__init__(*more, **named)
        batches = self.stream.batches

        def noted(*asked: Any) -> Iterator[np.ndarray]:
            for batch in batches(*asked):
                yield batch
                note_step(notes, self.spec.silo)  # who asks for the next one has made it

        self.stream.batches = noted


def measure_crash(run: Run) -> Figures:
    """Kill one silo of a run; it is over afterwards."""
    run.stop()
    while not run.status().over:
        time.sleep(0.1)
    job, notes, records = run.job, run.folder / "steps", list[Record]()
    notes.mkdir(exist_ok=True)
    pool, control, store = RayPool(make=partial(NotingSilo, notes)), Control(), RunStore(job)
    log = Log(JsonLines(store.metrics), records.append)
    rounds = threading.Thread(target=train, args=(job, pool, store, log, control), name="rounds")
    rounds.start()
    try:
        figures = kill_one(notes, job.sources[1].name, job.inner.local_steps)
    finally:
        control.stop()
        rounds.join()
        pool.close()
    # An attempt that found no quorum is all that could be lost: who answered in a round counts in it.
    return {**figures, "rounds_lost": sum(len(record.get("failed", [])) for record in records)}
