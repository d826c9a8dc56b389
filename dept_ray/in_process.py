"""A whole run in this process, without Ray: for a debugger, and for tests."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dept_ray.config import Job
from dept_ray.metrics import JsonLines, Log, Record, TensorBoard
from dept_ray.preparing import Report, begun, prepare, silent

if TYPE_CHECKING:
    from dept_ray.rounds.control import Control


def train_here(
    job: Job, log: Callable[[Record], None], report: Report = silent, control: "Control | None" = None
) -> Any:
    """The identical loop in this process, without Ray: for a debugger.

    Args:
        job: what to run.
        log: called with each record.
        report: called with (stage, done, of) while text is prepared.
        control: to stop or change the run from another thread or a signal.

    Returns:
        The run's last state.
    """
    from dept_ray.rounds.control import Control
    from dept_ray.rounds.mailbox import MailboxPool
    from dept_ray.rounds.pool import LocalPool
    from dept_ray.rounds.store import RunStore
    from dept_ray.rounds.train import train

    job = begun(job)
    store = RunStore(job)
    store.hold()
    board, pool = TensorBoard(store.folder / "tensorboard"), MailboxPool() if job.regions.mailbox else LocalPool()
    try:
        prepare(job, report=report, local=True)
        return train(job, pool, store, Log(JsonLines(store.metrics), board, log), control or Control())
    finally:
        board.close()
        pool.close()
        store.let_go()
