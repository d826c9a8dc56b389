"""`SiloPool`, the seam between rounds and wherever silos live, and `LocalPool`, its in-process twin.

The loop orders and gets answers; it never knows a process, a node or a network. `LocalPool` is public API: it trains
the silos one after the other in this process, with the same bits as a cluster, for a debugger and for tests.
"""

import os
from collections.abc import Mapping
from typing import Protocol

from dept_ray.config import Job, Resources
from dept_ray.errors import DeptError
from dept_ray.messages import RoundOrder, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.rounds.methods import method_of, silos_of, silos_per_round
from dept_ray.silo.hardware import threads_for
from dept_ray.silo.silo import Silo


class SiloPool(Protocol):
    """Where silos live."""

    def open(self) -> dict[str, SiloCard]:
        """Make every silo and get its card, by name."""
        ...

    def run_round(self, orders: Mapping[str, RoundOrder]) -> dict[str, SiloUpdate | Exception]:
        """Give each silo its order; return every answer, or the exception in its place."""
        ...

    def statuses(self) -> dict[str, SiloStatus]:
        """What each silo is doing; may be called from another thread, while a round runs."""
        ...

    def close(self) -> None:
        """Let all silos go."""
        ...


def specs_of(job: Job, cores: int | None = None) -> dict[str, SiloSpec]:
    """The silos of a job, by name.

    Args:
        job: the run.
        cores: of one machine, shared by the silos that train at once; None: this machine's.
    """
    method = method_of(job)
    threads = threads_for(job, silos_per_round(job), cores or os.cpu_count())
    return {
        name: SiloSpec(
            silo=name, sources=sources, vocabulary=method.vocabulary, share_body=method.share_body,
            share_rows=method.share_rows != "none", reset_embedding=method.reset_embedding, threads=threads,
            gpu=resources_of(job, name).num_gpus > 0,
        )
        for name, sources in silos_of(job).items()
    }  # fmt: skip


def resources_of(job: Job, silo: str) -> Resources:
    """What a silo holds: its source's own wish, or the job's."""
    return next((s.resources for s in job.sources if s.name == silo and s.resources), None) or job.resources


class LocalPool:
    """All silos in this process, one after the other."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.silos: dict[str, Silo] = {}

    def open(self) -> dict[str, SiloCard]:
        self.silos = {name: Silo(self.job, spec) for name, spec in specs_of(self.job).items()}
        return {name: silo.card() for name, silo in self.silos.items()}

    def run_round(self, orders: Mapping[str, RoundOrder]) -> dict[str, SiloUpdate | Exception]:
        answers: dict[str, SiloUpdate | Exception] = {}
        for name, order in orders.items():
            try:
                answers[name] = self.silos[name].obey(order)
            except DeptError as err:  # anything else is a bug, which a debugger wants to see
                answers[name] = err
        return answers

    def statuses(self) -> dict[str, SiloStatus]:
        return {name: silo.status for name, silo in self.silos.items()}

    def close(self) -> None:
        for silo in self.silos.values():
            silo.stream.close()
