"""`SiloActor` and `CoordinatorActor`: thin shells around `silo.Silo` and `rounds.train`.

Plain classes; they become actors where they are placed. What they hold is passed to them, what they decide is decided
below. The silo's `control` group answers while it trains. The coordinator trains in a thread from its first moment,
so one that Ray restarts goes on from the last committed round by itself. Who only places them needs no torch: it is
imported where they live.
"""

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from dept_ray.codec import Moves
from dept_ray.config import Job
from dept_ray.errors import DeptError, RunError, SiloError, StoreError, discreet
from dept_ray.messages import Change, Delta, RoundOrder, RunStatus, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.metrics import JsonLines, Log, Record, TensorBoard
from dept_ray.on_ray.prometheus import PrometheusSink, SiloGauges
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import in_progress, run_folder
from dept_ray.rounds.store import RunStore
from dept_ray.silo.memory import give_back, keep_freed_memory, loading

if TYPE_CHECKING:
    from dept_ray.on_ray.streaming import RayReader
    from dept_ray.rounds.pool import MakeSilo
    from dept_ray.silo.silo import Silo

PREDECESSOR_S = 60.0
"""How long a coordinator that Ray has started again waits for the one before it: a node that is taken for dead may
live for a while, and holds the run's folder as long."""


_LAST = 19
"""The lowest priority of a thread."""


class SiloActor:
    """One silo in a process of its own. It opens when asked for its card, so that what is wrong comes back whole."""

    def __init__(self, job: str, spec: SiloSpec, make: "MakeSilo") -> None:
        # Not by Ray's `runtime_env`: the process would have to be started first, and there are some that wait for work.
        if not spec.gpu:
            keep_freed_memory()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.job, self.spec, self.make = Job.model_validate_json(job), spec, make
        self.node = ray.get_runtime_context().get_node_id()
        self.silo: Silo | None = None
        self._orders = 0
        """That it has obeyed, this one included."""
        self.gauges = SiloGauges(self.job.name, spec.silo)

    def card(self) -> SiloCard:
        with self._discreet(), loading():
            self.silo = self.make(
                self.job, self.spec, read=lambda source, blocks: self._reader(source, blocks), run=self._behind_others
            )
            return self.silo.card()

    def _behind_others(self, compute: Callable[[], Any]) -> Any:
        """Make steps, or scores, and let first whoever starts, reads, takes up an order or makes the outer step.

        A silo that is made anew imports and compiles for 4 s, of a core that it would share with all who train; one
        that takes up its order shares it with those who have. On Linux each thread has a priority of its own, which
        nobody can take back; Ray gives its workers 15. Not for the first order, when all may be starting; nor with
        several threads: those of two who divide their work are more than there are cores, and OpenMP lets them sleep.
        """
        alone = self.spec.threads == self.spec.ranks == 1 and not self.spec.gpu
        if self._orders == 1 or not alone or sys.platform != "linux":
            return compute()
        return self._last.submit(compute).result()

    @cached_property
    def _last(self) -> ThreadPoolExecutor:
        """One thread of the lowest priority."""

        def begin() -> None:
            import torch

            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)
            torch.set_num_threads(1)
            give_back()

        return ThreadPoolExecutor(1, "computes", initializer=begin)

    @cached_property
    def _reader(self) -> "RayReader":
        """Ray Data is loaded when there is something to read ahead: a first step does not wait for it."""
        from dept_ray.on_ray.streaming import RayReader

        assert self.silo is not None, "only a silo reads"
        return RayReader(self.silo.corpora, self.job.inner.context)

    @ray.method(num_returns=3)
    def obey(
        self, order: RoundOrder, body: np.ndarray | Moves | None, rows: np.ndarray | Moves | None
    ) -> tuple[SiloUpdate, Delta | None, Delta | None]:
        assert self.silo is not None, "ordered before it was asked for its card"
        self._orders += 1
        with self._discreet():
            update = self.silo.obey(replace(order, body=body, rows=rows))
        return update.without_arrays(), update.delta("body"), update.delta("rows")

    @ray.method(num_returns=0)
    def go_ahead(self) -> None:
        """What a silo does between two orders; called right behind each. What goes wrong the next order finds out."""
        assert self.silo is not None, "ordered before it was asked for its card"
        try:
            self.silo.go_ahead()
        except Exception:  # noqa: BLE001 - nobody waits for this
            traceback.print_exc()

    @ray.method(concurrency_group="control")
    def status(self) -> SiloStatus:
        status = self.silo.status if self.silo is not None else SiloStatus(self.spec.silo, "opening")
        self.gauges(status)  # asked twice a second while a round is in progress
        return replace(status, node=self.node, pid=os.getpid())

    @ray.method(concurrency_group="control")
    def stop(self, round: int, attempt: int, *until: Any) -> None:
        """What the call names in `until` is on this node by now: Ray calls nobody before."""
        if self.silo is not None:
            self.silo.stop(round, attempt)

    @contextmanager
    def _discreet(self) -> Iterator[None]:
        """Under SPEC only so much of an exception leaves as may."""
        try:
            yield
        except Exception as err:
            told = discreet(err)
            if self.spec.share_rows or told is err:
                raise
            traceback.print_exc()
            raise told from None


class CoordinatorActor:
    """The outer loop in a process of its own, answering questions while it runs.

    Args:
        job: as JSON.
        cores: of a node, shared by the silos on it.
        leave: whether to end this process with the run, so that a detached run holds nothing when it is over.
    """

    def __init__(self, job: str, cores: int, leave: bool = False) -> None:
        with loading():
            from dept_ray.on_ray.pool import RayPool
            from dept_ray.rounds.mailbox import MailboxPool

        keep_freed_memory()
        self.job, self.leave = Job.model_validate_json(job), leave
        self.again = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self.control, self.pool = Control(self.again), MailboxPool() if self.job.regions.mailbox else RayPool(cores)
        self.phase, self.error = "starting", ""
        self.records: list[Record] = []
        self._asked_for: tuple[list[Change], Job] = ([], self.job)
        threading.Thread(target=self._run, name="rounds", daemon=True).start()

    async def status(self) -> RunStatus:
        rounds = [record["round"] for record in self.records]
        phase = "paused" if self.phase == "training" and self.control.paused else self.phase
        hardware = {name: card.hardware for name, card in self.pool.cards.items()}
        return RunStatus(
            run=self.job.name, phase=phase, round=max(rounds, default=0), rounds=self._asked().rounds.total,
            error=self.error, silos=self.pool.statuses(), hardware=hardware, num_records=len(self.records),
            pid=os.getpid(),
        )  # fmt: skip

    async def new_records(self, since: int) -> list[Record]:
        """Records from number `since` on."""
        return self.records[since:]

    async def stop(self) -> None:
        """End after the round in progress is committed."""
        self.control.stop()

    async def pause(self) -> None:
        """Hold after the round in progress."""
        await self._open_to_asking()
        self.control.pause()

    async def checkpoint(self) -> int:
        """Keep the round in progress, or the last one, for good; its number.

        Raises:
            RunError: the run is over.
        """
        await self._open_to_asking()
        return self.control.checkpoint()

    async def hand_in(self, round: int | None = None) -> None:
        """End a round by its number (1 is the first), or the one in progress, now, with what its silos have."""
        self.pool.hand_in((self.control.begun if round is None else round) - 1)

    async def resume(self) -> None:
        """Go on."""
        await self._open_to_asking()
        self.control.resume()

    async def step(self, rounds: int, request: str) -> None:
        """Let so many rounds through, then hold; `request` is the asker's own, in case it must ask twice."""
        await self._open_to_asking()
        self.control.step(rounds, request)

    async def change(self, change: Change, request: str) -> None:
        """Ask for a change, which is made between two rounds.

        Raises:
            ConfigError: it cannot be made; nothing was asked for.
        """
        from dept_ray.rounds.changes import check_asked

        await self._open_to_asking()
        if not self.control.knows(request):
            check_asked(self._asked(), change, self.records, self.control.pending, self.pool)
            self.control.change(change, request)

    def _asked(self) -> Job:
        """The job with all changes that were made, and those that were asked for and are not made yet."""
        from dept_ray.rounds.changes import changed

        made = [r["change"] for r in self.records if r["event"] == "change" and "refused" not in r]
        changes = [*made, *self.control.pending]
        known, job = self._asked_for
        if changes[: len(known)] != known:
            known, job = [], self.job
        self._asked_for = (changes, changed(job, changes[len(known) :]))
        return self._asked_for[1]

    async def _open_to_asking(self) -> None:
        """Wait until what is asked is kept.

        Raises:
            RunError: the run is over.
        """
        while self.phase == "starting":
            await asyncio.sleep(0.01)
        if self.phase != "training":
            raise RunError(f"run {self.job.name} is {self.phase}: nothing can be asked of it; start it again")

    def _alive(self) -> int:
        """How many silos have a process."""
        return sum(status.pid > 0 for status in self.pool.statuses().values())

    def _check_folder(self) -> None:
        """Whether the run's folder is on this node, where whoever started the run has made it.

        Raises:
            RunError: it is not, and to begin anew would lose all rounds.
        """
        if not (folder := run_folder(self.job)).exists():
            raise RunError(
                f"run folder {folder} is not on the node of its coordinator (the node that had it is gone, or the run "
                "was started from a machine outside the cluster): start it where the folder is, or put `folder` on a "
                "disk that all nodes see"
            )

    def _run(self) -> None:
        from dept_ray.rounds.train import train

        board = store = None
        mine = False
        try:
            self._check_folder()
            store = RunStore(self.job)
            store.hold(PREDECESSOR_S if self.again else 0.0, address=ray.get_runtime_context().gcs_address)
            mine = True
            self.records = store.history()
            stands = store.stands()
            self.control.begin(stands.round, stands.heard, store)
            board = TensorBoard(store.folder / "tensorboard")
            log = Log(JsonLines(store.metrics), board, PrometheusSink(self._alive), self.records.append)
            self.phase = "training"
            train(self.job, self.pool, store, log, self.control)
            # Its closing scores say that it is finished: how many rounds there are may have been changed meanwhile.
            phase, error = (
                ("finished" if self.records[-1:] and self.records[-1]["event"] == "scores" else "stopped"),
                "",
            )
        except DeptError as err:
            phase, error = "failed", f"{type(err).__name__}: {err}"
        except Exception:  # noqa: BLE001 - a bug must reach the user, not die with this thread
            phase, error = "failed", traceback.format_exc()
        if self.leave and error:
            self._leave_word(error, mine)
        closes = [board.close] if board is not None else []
        closes += [self.pool.close, *([store.let_go] if store is not None else [])]
        for close in closes:
            try:
                close()
            except Exception:  # noqa: BLE001 - what cannot be put away holds nothing else up
                traceback.print_exc()
        self.phase, self.error = phase, error
        if self.leave:
            # Everything is on disk. Ray would restart an actor that merely exits; one that is killed stays dead.
            ray.kill(ray.get_runtime_context().current_actor)

    def _leave_word(self, error: str, mine: bool) -> None:
        """Why the run failed, in its folder, before another may take it up; not in one that another holds."""
        folder = run_folder(self.job)
        with suppress(OSError, StoreError):  # the disk may be what it failed for
            if mine or in_progress(folder) is None:
                (folder / "error.txt").write_text(error)


def explain(err: RayError) -> DeptError:
    """What went wrong in an actor, as one of our own errors."""
    cause: Any = err.cause if isinstance(err, RayTaskError) else err
    if isinstance(cause, DeptError):
        return type(cause)(*cause.args)
    if isinstance(cause, OutOfMemoryError):  # whose own message says less on a page
        return SiloError("OutOfMemoryError: its node ran out of memory: lower inner.micro_batch, or place it elsewhere")
    text = str(cause).strip()
    return SiloError(f"{type(cause).__name__}: {text.splitlines()[-1] if text else 'no message'}")
