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
from dept_ray.text.prepare import prepare


class SiloPool(Protocol):
    """Where silos live."""

    @property
    def cards(self) -> dict[str, SiloCard]:
        """Of every silo that has been made so far."""
        ...

    def open(self, job: Job) -> None:
        """Make every silo of a job; those that cannot be placed yet may come later.

        Raises:
            DeptError: one cannot open its data; none could be placed.
        """
        ...

    def add(self, job: Job, silo: str) -> None:
        """Prepare and make one more silo, which is ready some time later; `job` already names its source.

        Raises:
            DeptError: it is known at once that this cannot be done.
        """
        ...

    def ready(self) -> set[str]:
        """Those that can take an order now. What died since is being made anew."""
        ...

    def run_round(self, orders: Mapping[str, RoundOrder], deadline_s: float) -> dict[str, SiloUpdate | Exception]:
        """Give each silo its order; return every answer, or the exception in its place.

        After the deadline the late are asked to hand in what they have; who does not is left out.
        """
        ...

    def statuses(self) -> dict[str, SiloStatus]:
        """What each silo is doing; may be called from another thread, while a round runs."""
        ...

    def failed(self) -> dict[str, str]:
        """Silos that could not be made, with the reason; each is told once."""
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
    """All silos in this process, one after the other; nobody is ever late."""

    def __init__(self) -> None:
        self.silos: dict[str, Silo] = {}

    @property
    def cards(self) -> dict[str, SiloCard]:
        return {name: silo.card() for name, silo in self.silos.items()}

    def open(self, job: Job) -> None:
        self.silos = {name: Silo(job, spec) for name, spec in specs_of(job).items()}

    def add(self, job: Job, silo: str) -> None:
        prepare(job, "own" if method_of(job).vocabulary == "own" else "global")
        self.silos[silo] = Silo(job, specs_of(job)[silo])

    def ready(self) -> set[str]:
        return set(self.silos)

    def run_round(self, orders: Mapping[str, RoundOrder], deadline_s: float) -> dict[str, SiloUpdate | Exception]:
        answers: dict[str, SiloUpdate | Exception] = {}
        for name, order in orders.items():
            try:
                answers[name] = self.silos[name].obey(order)
            except DeptError as err:  # anything else is a bug, which a debugger wants to see
                answers[name] = err
        return answers

    def statuses(self) -> dict[str, SiloStatus]:
        return {name: silo.status for name, silo in self.silos.items()}

    def failed(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        for silo in self.silos.values():
            silo.stream.close()
