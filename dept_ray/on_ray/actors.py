"""`SiloActor` and `CoordinatorActor`: thin shells around `silo.Silo` and `rounds.train`.

Plain classes; they become actors where they are placed. What they hold is passed to them, what they decide is decided
below. The silo's `control` group answers while it trains. The coordinator trains in a thread from its first moment,
so one that Ray restarts goes on from the last committed round by itself.
"""

import os
import threading
import traceback
from dataclasses import replace

import numpy as np
import ray

from dept_ray.config import Job
from dept_ray.errors import DeptError
from dept_ray.messages import RoundOrder, RunStatus, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.metrics import JsonLines, Log, Record, TensorBoard
from dept_ray.rounds.control import Control
from dept_ray.rounds.store import RunStore, run_folder


class SiloActor:
    """One silo in a process of its own."""

    def __init__(self, job: str, spec: SiloSpec) -> None:
        from dept_ray.on_ray.streaming import RayReader
        from dept_ray.silo.silo import Silo, open_corpora

        config = Job.model_validate_json(job)
        self.silo = Silo(config, spec, read=RayReader(open_corpora(config, spec), config.inner.context))

    def card(self) -> SiloCard:
        return self.silo.card()

    @ray.method(num_returns=3)
    def obey(
        self, order: RoundOrder, body: np.ndarray | None, rows: np.ndarray | None
    ) -> tuple[SiloUpdate, np.ndarray | None, np.ndarray | None]:
        update = self.silo.obey(replace(order, body=body, rows=rows))
        return update.without_arrays(), update.body, update.rows

    @ray.method(concurrency_group="control")
    def status(self) -> SiloStatus:
        return self.silo.status

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Its process, for an operator who wants to look, or to kill."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def stop(self, round: int, attempt: int) -> None:
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
        self.control, self.pool = Control(), RayPool(self.job, cores)
        self.phase, self.error = "starting", ""
        self.records: list[Record] = []
        threading.Thread(target=self._run, name="rounds", daemon=True).start()

    async def status(self) -> RunStatus:
        rounds = [record["round"] for record in self.records]
        return RunStatus(
            run=self.job.name, phase=self.phase, round=max(rounds, default=0), rounds=self.job.rounds.total,
            error=self.error, silos=self.pool.statuses(), hardware=self.pool.hardware, num_records=len(self.records),
            pid=os.getpid(),
        )  # fmt: skip

    async def new_records(self, since: int) -> list[Record]:
        """Records from number `since` on."""
        return self.records[since:]

    async def stop(self) -> None:
        """End after the round in progress is committed."""
        self.control.stop()

    def _run(self) -> None:
        from dept_ray.rounds.train import train

        board = None
        try:
            store = RunStore(self.job)
            self.records = store.history()
            board = TensorBoard(store.folder / "tensorboard")
            log = Log(JsonLines(store.metrics), board, self.records.append)
            self.phase = "training"
            state = train(self.job, self.pool, store, log, self.control)
            phase, error = ("finished" if state.round == self.job.rounds.total else "stopped"), ""
        except DeptError as err:
            phase, error = "failed", f"{type(err).__name__}: {err}"
        except Exception:  # noqa: BLE001 - a bug must reach the user, not die with this thread
            phase, error = "failed", traceback.format_exc()
        if board is not None:
            board.close()
        self.pool.close()
        self.phase, self.error = phase, error
        if self.leave:
            if error:
                (run_folder(self.job) / "error.txt").write_text(error)
            # Everything is on disk. Ray would restart an actor that merely exits; one that is killed stays dead.
            ray.kill(ray.get_runtime_context().current_actor)
