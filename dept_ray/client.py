"""`Run`: the handle on a run that the command line and notebooks share.

    run = Run.start(load_job("jobs/tiny_spec.toml"))      # prepares the text, starts Ray if there is none
    run.follow()                                          # until it is over
    run.history()[-1]["mean"]["bits_per_byte"]

A run that is over is read from its folder; one in progress is asked.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError, RunError, StoreError
from dept_ray.messages import RunStatus
from dept_ray.metrics import JsonLines, Log, Record, TensorBoard, read_records

if TYPE_CHECKING:
    from rich.console import Console

    from dept_ray.on_ray.launch import Coordinator

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, of: int) -> None:
    """Reports nothing."""


@dataclass
class Run:
    """One run, in progress or over."""

    job: Job
    folder: Path
    _coordinator: "Coordinator | None" = None

    # ------------------------------------------------------------------------------------------ getting one
    @classmethod
    def start(cls, job: Job, address: str | None = None, detach: bool = False, report: Report = silent) -> "Run":
        """Begin a run on Ray, or go on with the one in its folder; prepares the text first where that is due.

        Args:
            job: what to run.
            address: of a cluster; None: RAY_ADDRESS, else a local Ray of this process.
            detach: leave the run to the cluster when this process ends.
            report: called with (stage, done, of) while text is prepared.

        Raises:
            ClusterError: no cluster there, or it can never hold the silos.
            DataError: the text cannot be prepared.
            WrongRunError: the run folder belongs to another job.
        """
        from dept_ray.on_ray.cluster import check_room, connect
        from dept_ray.on_ray.launch import Coordinator
        from dept_ray.rounds.methods import silos_of
        from dept_ray.rounds.store import RunStore

        store = RunStore(job)  # refuses another job's folder before anything is spent
        connect(address, silos=len(silos_of(job)))
        check_room(job)
        prepare(job, address, report)
        return cls(job, store.folder, Coordinator.start(job, detach))

    @classmethod
    def open(cls, run: str | Path) -> "Run":
        """A run by its name (under ./runs) or folder, over or not; it is only read.

        Raises:
            ConfigError: there is no such run.
        """
        folder = next((p for p in (Path(run), Path("runs") / run) if (p / "config.json").exists()), None)
        if folder is None:
            known = sorted(p.parent.name for p in Path("runs").glob("*/config.json"))
            raise ConfigError(
                f'no run "{run}": neither a run folder nor a name under runs/ (known: {", ".join(known) or "none"})'
            )
        try:
            job = Job.model_validate(json.loads((folder / "config.json").read_text())["job"])
            # The folder may have been moved since: its data and snapshots came along.
            job = job.model_copy(update={"folder": str(folder.absolute().parents[1])})
        except (ValueError, KeyError) as err:
            raise StoreError(f"{folder / 'config.json'} cannot be read ({err}): restore it") from None
        return cls(job, folder)

    @classmethod
    def attach(cls, run: str | Path, address: str | None = None) -> "Run":
        """A run in progress on a cluster.

        Raises:
            RunError: it is not in progress there.
        """
        from dept_ray.on_ray.cluster import connect
        from dept_ray.on_ray.launch import Coordinator

        opened = cls.open(run)
        connect(address)
        coordinator = Coordinator.find(opened.job.name)
        if coordinator is None:
            raise RunError(
                f"run {opened.job.name} is not in progress on this cluster; `dept-ray train` goes on with it"
            )
        return cls(opened.job, opened.folder, coordinator)

    # ------------------------------------------------------------------------------------------ asking and telling
    def status(self) -> RunStatus:
        """How it is; from its folder where it is not in progress."""
        if self._coordinator is not None:
            return self._coordinator.status()
        records = self.history()
        rounds = max((r["round"] for r in records), default=0)
        phase = "finished" if any(r["event"] == "scores" for r in records) else "not in progress"
        file = self.folder / "error.txt"
        error = file.read_text() if file.exists() else ""
        return RunStatus(self.job.name, phase, rounds, self.job.rounds.total, error,
                         num_records=len(records))  # fmt: skip

    def new_records(self, since: int) -> list[Record]:
        """Records from number `since` on."""
        return self.history()[since:] if self._coordinator is None else self._coordinator.new_records(since)

    def history(self) -> list[Record]:
        """All records; their fields are told in `rounds.ledger`."""
        return read_records(self.folder / "metrics.jsonl")

    def stop(self) -> None:
        """End after the round in progress is committed."""
        if self._coordinator is not None:
            self._coordinator.stop()

    def kill(self) -> None:
        """End now; the last committed round stands."""
        if self._coordinator is not None:
            self._coordinator.kill()

    def follow(self, console: "Console | None" = None) -> list[Record]:
        """Show the run until it is over.

        Raises:
            RunError: it failed; with its reason.
        """
        from rich.console import Console

        from dept_ray.console import watch

        status, records = watch(console or Console(), self.status, self.new_records)
        if status.phase == "failed":
            raise RunError(f"run {status.run} failed after round {status.round}: {status.error}")
        return records


def prepare(job: Job, address: str | None = None, report: Report = silent, local: bool = False) -> None:
    """Raw text to shards, where that is due: on Ray Data, or in this process.

    Raises:
        DataError: the text cannot be prepared.
    """
    from dept_ray.rounds.methods import method_of
    from dept_ray.text.prepare import prepare as prepare_text
    from dept_ray.text.prepare import run_here

    kind = "own" if method_of(job).vocabulary == "own" else "global"
    if local:
        prepare_text(job, kind, run_here, report)
        return
    from dept_ray.on_ray.cluster import connect
    from dept_ray.on_ray.ingest import ray_data_runner

    connect(address, silos=len(job.sources))
    prepare_text(job, kind, ray_data_runner(job), report)


def train_here(job: Job, log: Callable[[Record], None], report: Report = silent) -> Any:
    """The identical loop in this process, without Ray: for a debugger.

    Returns:
        The run's last state.
    """
    from dept_ray.rounds.control import Control
    from dept_ray.rounds.pool import LocalPool
    from dept_ray.rounds.store import RunStore
    from dept_ray.rounds.train import train

    store = RunStore(job)
    prepare(job, report=report, local=True)
    board, pool = TensorBoard(store.folder / "tensorboard"), LocalPool(job)
    try:
        return train(job, pool, store, Log(JsonLines(store.metrics), board, log), Control())
    finally:
        board.close()
        pool.close()
