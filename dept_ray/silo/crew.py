"""`Ranks`: the other ranks of a silo, as rank 0 has them: started with its first training order, anew when one is lost.

They remember nothing between two orders: each begins with a copy of what rank 0 has (of moments, where they are kept in
`parts`, of its own), so that snapshots, messages and scores are rank 0's alone, and a rank that is lost costs the
order, never the silo. They are child processes, in process and on a cluster alike: there the silo's one actor holds the
GPUs of all its ranks, so that they are granted and given back together. (A placement group outlives whoever made it:
one that is killed, or started again, leaves its GPUs held until the whole job ends.) What they do is `follower`; how
they are started is an argument, for tests.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder, SiloSpec
from dept_ray.silo.team import ALONE, Team, join, new_store

_LOOK_EVERY_S = 0.02


class Crew(Protocol):
    """Ranks 1, 2, ... of a silo, started."""

    def gone(self) -> bool:
        """Whether one of them has ended."""
        ...

    def end(self) -> None:
        """End them all, whatever they are doing."""
        ...


Start = Callable[[int, SiloSpec], Crew]
"""Starts `follower.follow(port, rank)` for each rank but 0."""


class Ranks:
    """Of one silo.

    Args:
        job, spec: what the silo was made of.
        start: how the others are started.
    """

    def __init__(self, job: Job, spec: SiloSpec, start: Start) -> None:
        self.job, self.spec, self._start = job, spec, start
        self._crew: Crew | None = None
        self._store: Any = None
        self._team, self._orders = ALONE, 0

    @contextmanager
    def following(self, order: RoundOrder, moments: Mapping[str, torch.Tensor]) -> Iterator[Team]:
        """All ranks, who train along with an order; whatever ends this early ends the others.

        Args:
            order: what rank 0 obeys.
            moments: of the optimizer, which the others must make room for.

        Raises:
            SiloError: another rank could not be started, failed or is gone.
        """
        if self.spec.ranks == 1:
            yield ALONE
            return
        self.assemble()
        try:
            self._orders += 1
            shapes = {name: list(tensor.shape) for name, tensor in moments.items()}
            told = {"order": asdict(order.without_arrays()), "moments": shapes}
            self._store.set(f"order/{self._orders}", json.dumps(told))
            yield self._team
        except BaseException as err:  # the others wait in the middle of a step
            told = self._told() if isinstance(err, SiloError) else ""
            self.close()
            if told:
                raise SiloError(told) from None
            raise

    def close(self) -> None:
        """Let the others go."""
        if self._crew is not None:
            self._store.set(f"order/{self._orders + 1}", "null")  # who waits for it ends without a complaint
            self._crew.end()
            self._team.leave()
        self._crew, self._store, self._team, self._orders = None, None, ALONE, 0

    def assemble(self) -> None:
        """Start the others and meet them, unless they are here.

        Raises:
            SiloError: one could not be started.
        """
        if self.spec.ranks == 1 or (self._crew is not None and not self._crew.gone()):
            return
        self.close()
        limit_s = self.job.faults.start_timeout_s
        with ExitStack() as unless_all_meet:
            unless_all_meet.callback(self.close)  # they would wait for a rank 0 that trains alone
            self._store = new_store(limit_s)
            self._store.set("job", self.job.model_dump_json())
            self._store.set("spec", json.dumps(asdict(self.spec)))
            self._crew, began = self._start(self._store.port, self.spec), time.monotonic()
            while not self._store.check([f"here/{rank}" for rank in range(1, self.spec.ranks)]):
                late = time.monotonic() - began > limit_s
                told = f"its ranks did not start within faults.start_timeout_s = {limit_s:g}" if late else ""
                if late or self._crew.gone():
                    raise SiloError(self._told() or told or "one of its ranks ended as it began; its own log says more")
                time.sleep(_LOOK_EVERY_S)
            self._team = join(self._store, 0, self.spec.ranks, self.spec.gpu, limit_s, self._crew.gone)
            unless_all_meet.pop_all()

    def _told(self) -> str:
        """What went wrong, as the others have told it."""
        keys = {rank: f"failed/{rank}" for rank in range(1, self.spec.ranks)}
        told = {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        return "; ".join(f"rank {rank} of {self.spec.ranks}: {reason}" for rank, reason in told.items())


class _Processes:
    """Child processes of this one, which they do not outlive: each ends when the pipe to its input does."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    def gone(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


def start_processes(port: int, spec: SiloSpec) -> Crew:
    """The others as child processes; on GPUs each sees one of those that this process sees.

    Raises:
        SiloError: they are too few.
    """
    seen = _visible_gpus() if spec.gpu else [""] * spec.ranks
    if len(seen) < spec.ranks:
        raise SiloError(
            f"silo {spec.silo} has {spec.ranks} ranks, but its process sees {len(seen)} GPUs: lower resources.num_gpus"
        )
    # A rank whose first is gone would print a stack of addresses before it ends.
    paths = os.pathsep.join(path for path in sys.path if path)
    env = os.environ | {"PYTHONPATH": paths, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes = []
    for rank in range(1, spec.ranks):
        own = {"CUDA_VISIBLE_DEVICES": seen[rank]} if spec.gpu else {}
        command = [sys.executable, "-m", "dept_ray.silo.follower", str(port), str(rank)]
        # A session of its own: Ctrl-C is rank 0's to hear.
        processes.append(subprocess.Popen(command, env=env | own, stdin=subprocess.PIPE, start_new_session=True))
    return _Processes(processes)


def _visible_gpus() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]
