"""`SiloPool`, the seam between rounds and wherever silos live, and `LocalPool`, its in-process twin.

The loop orders and gets answers; it never knows a process, a node or a network. `LocalPool` is public API: it trains
the silos one after the other in this process, with the same bits as a cluster, for a debugger and for tests.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from dept_ray.config import Job
from dept_ray.errors import ConfigError, DeptError
from dept_ray.messages import RoundOrder, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.rounds.methods import method_of, resources_of, silos_of, silos_per_round
from dept_ray.silo.hardware import compile_pays, threads_for
from dept_ray.silo.silo import Silo
from dept_ray.text.prepare import prepare, tokenizer_kind

Deadline = Callable[[Sequence[float]], float]
"""Seconds that a round may take, given what those took who have answered in it already."""

Meanwhile = Callable[[], None]
"""What a coordinator does once the orders are taken up, while silos train: the round before is written to disk."""

ANY_ATTEMPT = 1 << 30
"""Above the number of any: a round is handed in whichever of its attempts is in progress."""

MakeSilo = Callable[..., Silo]
"""`Silo`, or what stands in for it: called with (job, spec) and, on Ray, `read` and `run`."""


def fence_of(orders: Mapping[str, RoundOrder]) -> tuple[int, int]:
    """The round and attempt that all of some orders are of; of none, one that nobody means."""
    return max((order.fence for order in orders.values()), default=(ANY_ATTEMPT, 0))


def nothing() -> None:
    """A `Meanwhile` with nothing to do."""


class Beside:
    """Work in a thread of its own: who waits for answers goes on looking after those who are late."""

    def __init__(self, work: Meanwhile, thread: Executor) -> None:
        self._work, self._thread = work, thread
        self._done: Future[None] | None = None

    def begin(self) -> None:
        """Once, however often it is called."""
        if self._done is None:
            self._done = self._thread.submit(self._work)

    def look(self) -> None:
        """Raises what the work has failed with."""
        if self._done is not None and self._done.done():
            self._done.result()


@contextmanager
def beside(work: Meanwhile) -> Iterator[Beside]:
    """`Beside`, whose work is done in the end, whatever happens."""
    with ThreadPoolExecutor(1, thread_name_prefix="meanwhile") as thread:
        work_beside = Beside(work, thread)
        try:
            yield work_beside
        finally:
            work_beside.begin()
    work_beside.look()  # it has ended with its thread


class SiloPool(Protocol):
    """Where silos live."""

    remote: bool
    """Whether silos work while this process does something else."""

    @property
    def cards(self) -> dict[str, SiloCard]:
        """Of every silo that has been made so far."""
        ...

    def open(self, job: Job, first: Job) -> None:
        """Make every silo of a job; those that cannot be placed yet may come later.

        Args:
            job: in force now.
            first: as the run began.

        Raises:
            DeptError: one cannot open its data; none could be placed.
        """
        ...

    def add(self, job: Job, silo: str) -> None:
        """Prepare and make a silo that is not there, which is ready some time later; `job` already names its source.

        Raises:
            DeptError: it is known at once that this cannot be done.
        """
        ...

    def ready(self) -> set[str]:
        """Those that can take an order now. What died since is being made anew."""
        ...

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        """Give each silo its order, do something `meanwhile`; return every answer, or the exception in its place.

        After the deadline the late are asked to hand in what they have; who does not is left out.
        """
        ...

    def hand_in(self, round: int, attempt: int = ANY_ATTEMPT) -> None:
        """Ask all who train under orders of that round and attempt, or of one before, to hand in what they have.

        May be called from another thread, which may be late: what it does not mean is not cut short.
        """
        ...

    def rest(self) -> None:
        """Let nobody make steps ahead until the next orders."""
        ...

    def statuses(self) -> dict[str, SiloStatus]:
        """What each silo is doing; may be called from another thread, while a round runs."""
        ...

    def failed(self) -> dict[str, str]:
        """Silos that could not be made, with the reason."""
        ...

    def close(self) -> None:
        """Let all silos go."""
        ...


def specs_of(job: Job, first: Job | None = None, cores: int | None = None) -> dict[str, SiloSpec]:
    """The silos of a job, by name.

    Args:
        job: the run, as it is now.
        first: as it began; what a silo runs on follows from it, so that no change makes later silos compute other bits
            than those that were there before. None: the same.
        cores: of one machine, shared by the silos that train at once; None: this machine's.
    """
    method, first = method_of(job), first or job
    threads = threads_for(first, silos_per_round(first), cores or os.cpu_count())
    wishes = {name: resources_of(job, name) for name in silos_of(job)}
    ranks = {name: wish.processes for name, wish in wishes.items()}
    return {
        name: SiloSpec(
            silo=name, sources=sources, held_out=job.held_out, vocabulary=method.vocabulary,
            share_body=method.share_body, share_rows=method.share_rows != "none",
            reset_embedding=method.reset_embedding,
            threads=max(1, threads // ranks[name]), gpu=wishes[name].num_gpus > 0,
            compile=compile_pays(first), gpu_part=min(1.0, wishes[name].num_gpus), ranks=ranks[name],
            shard=wishes[name].shard,
        )
        for name, sources in silos_of(job).items()
    }  # fmt: skip


def without_other_newcomers(job: Job, silo: str) -> Job:
    """The job in which of all who joined only one is left: another's mistake is not its own."""
    sources = tuple(source for source in job.sources if not source.joined or source.name == silo)
    return job.model_copy(update={"sources": sources})


def timed(
    answers: Mapping[str, SiloUpdate | Exception], asked_at: Mapping[str, float], at: Mapping[str, float]
) -> dict[str, SiloUpdate | Exception]:
    """The answers of a round, with the seconds that only a pool can see.

    Args:
        answers: by silo.
        asked_at: when each order was given.
        at: when each answer was there.
    """
    last = max(at.values(), default=0.0)
    seen: dict[str, SiloUpdate | Exception] = {}
    for name, answer in answers.items():
        if isinstance(answer, SiloUpdate):
            busy = sum(s for what, s in answer.seconds.items() if what != "ahead")  # that was before it was asked
            send = max(0.0, at[name] - asked_at[name] - busy)
            answer = replace(answer, seconds={**answer.seconds, "send": send, "wait": last - at[name]})
        seen[name] = answer
    return seen


class LocalPool:
    """All silos in this process, one after the other; nobody is ever late.

    Args:
        make: what makes a silo.
    """

    remote = False

    def __init__(self, make: MakeSilo = Silo) -> None:
        self.make = make
        self.silos: dict[str, Silo] = {}
        self._orders: dict[str, RoundOrder] = {}

    @property
    def cards(self) -> dict[str, SiloCard]:
        return {name: silo.card() for name, silo in self.silos.items()}

    def open(self, job: Job, first: Job) -> None:
        self.first = first
        for name, spec in specs_of(job, first).items():
            self._make(job, name, spec)

    def add(self, job: Job, silo: str) -> None:
        if silo not in self.silos:
            prepare(without_other_newcomers(job, silo), tokenizer_kind(method_of(job).vocabulary))
            self._make(job, silo, specs_of(job, self.first)[silo])

    def ready(self) -> set[str]:
        return set(self.silos)

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        meanwhile()
        answers: dict[str, SiloUpdate | Exception] = {}
        asked_at, at = dict[str, float](), dict[str, float]()
        self._orders = {name: order.without_arrays() for name, order in orders.items()}  # nor the state behind them
        for name, order in orders.items():
            asked_at[name] = time.monotonic()
            try:
                answers[name] = self.silos[name].obey(order)
            except DeptError as err:  # anything else is a bug, which a debugger wants to see
                answers[name] = err
            at[name] = time.monotonic()
        return timed(answers, asked_at, at)

    def hand_in(self, round: int, attempt: int = ANY_ATTEMPT) -> None:
        for name, order in self._orders.items():
            if order.fence <= (round, attempt):
                self.silos[name].stop(order.round, order.attempt)

    def rest(self) -> None:
        """Steps that go ahead of an order are made when it is here."""

    def statuses(self) -> dict[str, SiloStatus]:
        return {name: silo.status for name, silo in self.silos.items()}

    def failed(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        for silo in self.silos.values():
            silo.close()

    def _make(self, job: Job, name: str, spec: SiloSpec) -> None:
        silo = self.make(job, spec)
        if cut := [n for n, other in {**self.silos, name: silo}.items() if other.hardware.shard == "all"][1:]:
            silo.close()
            raise ConfigError(
                f'resources.shard = "all" also for {cut[0]}: torch lets a process have one silo whose model is cut; '
                "train on Ray (without --local), where each has a process of its own"
            )
        self.silos[name] = silo
