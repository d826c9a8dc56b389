"""`SiloActor` and `CoordinatorActor`: thin shells around `silo.Silo` and `rounds.train`.

Plain classes; they become actors where they are placed. What they hold is passed to them, what they decide is decided
below. The silo's `control` group answers while it trains. The coordinator trains in a thread from its first moment,
so one that Ray restarts goes on from the last committed round by itself.
"""

import os
import threading
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import ray

from dept_ray.config import Change, Job
from dept_ray.errors import DeptError, ShardError, SiloError, StoreError
from dept_ray.messages import RoundOrder, RunStatus, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.metrics import JsonLines, Log, Record, TensorBoard
from dept_ray.rounds.changes import check_change
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore, run_folder

if TYPE_CHECKING:
    from dept_ray.silo.silo import Silo


class SiloActor:
    """One silo in a process of its own. It opens when asked for its card, so that what is wrong comes back whole."""

    def __init__(self, job: str, spec: SiloSpec) -> None:
        self.job, self.spec = Job.model_validate_json(job), spec
        self.silo: Silo | None = None

    def card(self) -> SiloCard:
        from dept_ray.on_ray.streaming import RayReader
        from dept_ray.silo.silo import Silo, open_corpora

        reader = RayReader(open_corpora(self.job, self.spec), self.job.inner.context)
        self.silo = Silo(self.job, self.spec, read=reader)
        return self.silo.card()

    @ray.method(num_returns=3)
    def obey(
        self, order: RoundOrder, body: np.ndarray | None, rows: np.ndarray | None
    ) -> tuple[SiloUpdate, np.ndarray | None, np.ndarray | None]:
        assert self.silo is not None, "ordered before it was asked for its card"
        try:
            update = self.silo.obey(replace(order, body=body, rows=rows))
        except (SiloError, StoreError, ShardError):
            raise
        except Exception as err:
            if self.spec.share_rows:
                raise
            # What an exception says may hold an id, a shape or a piece of text, and under SPEC none of them leaves.
            traceback.print_exc()
            raise SiloError(f"{type(err).__name__}; its own log says more") from None
        return update.without_arrays(), update.body, update.rows

    @ray.method(concurrency_group="control")
    def status(self) -> SiloStatus:
        return self.silo.status if self.silo is not None else SiloStatus(self.spec.silo, "opening")

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Its process, for an operator who wants to look, or to kill."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def stop(self, round: int, attempt: int) -> None:
        if self.silo is not None:
            self.silo.stop(round, attempt)


class CoordinatorActor:
    """The outer loop in a process of its own, answering questions while it runs.

    Args:
        job: as JSON.
        cores: of a node, shared by the silos on it.
        leave: whether to end this process with the run, so that a detached run holds nothing when it is over.
    """

    def __init__(self, job: str, cores: int, leave: bool = False) -> None:
        from dept_ray.on_ray.pool import RayPool

        self.job, self.leave = Job.model_validate_json(job), leave
        self.control, self.pool = Control(), RayPool(cores)
        self.phase, self.error = "starting", ""
        self.records: list[Record] = []
        self.asked = self.job
        """The job with all changes that were asked for so far."""
        threading.Thread(target=self._run, name="rounds", daemon=True).start()

    async def status(self) -> RunStatus:
        rounds = [record["round"] for record in self.records]
        phase = "paused" if self.phase == "training" and self.control.paused else self.phase
        hardware = {name: card.hardware for name, card in self.pool.cards.items()}
        return RunStatus(
            run=self.job.name, phase=phase, round=max(rounds, default=0), rounds=self.asked.rounds.total,
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
        self.control.pause()

    async def resume(self) -> None:
        """Go on."""
        self.control.resume()

    async def step(self, rounds: int) -> None:
        """Let so many rounds through, then hold."""
        self.control.step(rounds)

    async def change(self, change: Change) -> None:
        """Ask for a change, which is made between two rounds.

        Raises:
            ConfigError: it cannot be made; nothing was asked for.
        """
        self.asked = check_change(self.asked, change)
        self.control.change(change)

    def _run(self) -> None:
        from dept_ray.rounds.train import train

        board = store = None
        try:
            store = RunStore(self.job)
            store.hold(address=ray.get_runtime_context().gcs_address)
            self.records = store.history()
            self.asked = self.job.changed(store.changes())
            board = TensorBoard(store.folder / "tensorboard")
            log = Log(JsonLines(store.metrics), board, self.records.append)
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
        if board is not None:
            board.close()
        self.pool.close()
        if store is not None:
            store.let_go()
        self.phase, self.error = phase, error
        if self.leave:
            if error:
                (run_folder(self.job) / "error.txt").write_text(error)
            # Everything is on disk. Ray would restart an actor that merely exits; one that is killed stays dead.
            ray.kill(ray.get_runtime_context().current_actor)
