"""A silo that fails as planned, wherever it lives: in this process or as an actor in one of its own.

Its plan says what happens at which moment; a claim in a folder sees to it that each thing happens once, whatever dies
meanwhile. It writes down which batches every order read. Ray's workers get this module by value: they need no tests/.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dept_ray.codec import encode
from dept_ray.draws import checksum
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.silo.silo import Silo

Moment = tuple[int, int, str]
"""(round, attempt, silo) of an order."""

FAULTS = {
    "dies before": "ActorDied", "dies within": "ActorDied", "dies after": "ActorDied",
    "raises": "the fan is broken|its own log says more", "nan": "not finite", "duplicate": "asked was", "late": "",
    "starves": "OutOfMemory|ActorDied|OwnerDied", "deaf": "",
}  # fmt: skip
"""What may happen, and what is said of it. "late" hands in after one step and "deaf" answers nobody for a while."""


class Died(SiloError):
    """Stands for a process that is gone, where there is only one."""


class FaultySilo(Silo):
    """Obeys, but for its plan.

    Args:
        plan: what happens when.
        notes: folder of claims and of what was read.
        alone: whether it has a process to lose.
        pace_s: what each step takes at least, so that a round lasts long enough to be struck on any machine.
    """

    def __init__(
        self, plan: Mapping[Moment, str], notes: str, alone: bool, *args: Any, pace_s: float = 0.0, **more: Any
    ) -> None:
        self.plan, self.notes, self.alone, self.pace_s = plan, Path(notes), alone, pace_s
        self.last: SiloUpdate | None = None
        self.early: list[str] = []
        """What it reads ahead of an order; the next order's trace begins with what it made of it."""
        super().__init__(*args, **more)
        batches = self.stream.batches
        self.stream.batches = lambda position, steps: self._traced(position, batches(position, steps))

    def obey(self, order: RoundOrder) -> SiloUpdate:
        self.moment = (order.round, order.attempt, order.silo)
        self.fault = self.plan.get(self.moment, "") if order.steps else ""
        name = f"{order.round}-{order.attempt}-{order.silo}"
        if self.fault:
            try:
                (self.notes / f"claim-{name}").mkdir(parents=True)
            except FileExistsError:
                self.fault = ""
        self.begins, self.going_ahead = order.position, False
        self.trace = self.notes / f"read-{name}-{order.life}"
        if self.fault == "dies before":
            self._die()
        if self.fault == "starves":
            self._starve()
        if self.fault == "deaf":
            ctypes.PyDLL(None).sleep(6)  # and keeps the interpreter's lock meanwhile
        update = super().obey(order)
        if self.fault == "dies after":
            self._die()
        if self.fault == "duplicate":
            return replace(self.last or update, round=order.round - 1)
        self.last = update
        if self.fault == "nan":
            sent = {w: v for w in ("body", "rows") if (v := getattr(update, w)) is not None}
            spoilt = {w: np.full(v.shape, np.nan, np.float32) for w, v in sent.items()}
            lossy = order.codec != "fp32"
            return replace(update, **{w: encode(a, order.codec)[0] if lossy else a for w, a in spoilt.items()})
        return update

    def go_ahead(self) -> None:
        self.early, self.going_ahead = [], True
        super().go_ahead()

    def _traced(self, position: Mapping[str, int], batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        if self.going_ahead:
            for batch in batches:
                self.early.append(checksum(np.ascontiguousarray(batch)))
                yield batch
                time.sleep(self.pace_s)
            return
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        made = (sum(position.values()) - sum(self.begins.values())) // self.stream.batch_size
        with open(self.trace, "w") as file:
            file.writelines(line + "\n" for line in self.early[:made])
            for done, batch in enumerate(batches, made):
                if done >= 1 and self.fault == "dies within":
                    self._die()
                if done >= 1 and self.fault == "raises":
                    raise (RuntimeError if self.alone else SiloError)("the fan is broken")
                if done >= 1 and self.fault == "late":
                    self.stop(*self.moment[:2])
                file.write(checksum(np.ascontiguousarray(batch)) + "\n")
                file.flush()
                yield batch
                time.sleep(self.pace_s)

    def _die(self) -> None:
        if not self.alone:
            raise Died("ActorDied: its process is gone")
        os.kill(os.getpid(), signal.SIGKILL)

    def _starve(self) -> None:
        held = []
        while len(held) < 256:  # 8 GiB, of pages that are touched
            held.append(np.ones(32 << 20, np.uint8))
            time.sleep(0.002)
        time.sleep(30)


def reads_of(notes: Path) -> dict[Moment, list[str]]:
    """Which batches each order read, the last life's where several read the same."""
    found: dict[Moment, list[str]] = {}
    for file in sorted(notes.glob("read-*"), key=lambda path: int(path.name.split("-")[-1])):
        _, round, attempt, silo, _ = file.name.split("-")
        found[int(round), int(attempt), silo] = file.read_text().split()
    return found
