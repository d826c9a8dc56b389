"""What is done before a run begins, wherever it will train: its text becomes shards, and what it begins from is
found.
"""

from collections.abc import Callable

from dept_ray.config import Job
from dept_ray.errors import StoreError

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, of: int) -> None:
    """Reports nothing."""


def prepare(job: Job, address: str | None = None, report: Report = silent, local: bool = False) -> None:
    """Raw text to shards, where that is due: on Ray, or in this process. Behind a mailbox each region does it.

    Raises:
        ConfigError: it cannot be prepared region by region.
        DataError: the text cannot be prepared.
    """
    from dept_ray.rounds.methods import method_of
    from dept_ray.rounds.regions import check_regions
    from dept_ray.text.prepare import prepare as prepare_text
    from dept_ray.text.prepare import run_here, tokenizer_kind

    check_regions(job)
    if job.regions.mailbox:
        return
    kind = tokenizer_kind(method_of(job).vocabulary)
    run_all = run_here
    if not local:
        from dept_ray.on_ray.cluster import check_room, connect
        from dept_ray.on_ray.ingest import ray_runner

        connect(address, silos=len(job.sources))
        check_room(job)  # a task for labels that no node has would wait for ever
        run_all = ray_runner(job)
    try:
        prepare_text(job, kind, run_all, report)
    except OSError as err:
        raise StoreError(f"prepared text cannot be written under {job.folder} or a source's storage ({err})") from err
    if job.init.embedding != "random":
        from dept_ray.rounds.origin import fit_vocabulary

        fit_vocabulary(job)


def begun(job: Job) -> Job:
    """The job once it has what it begins from (`rounds.origin`); most begin from nothing.

    Raises:
        ConfigError, StoreError: there is no such run or checkpoint, it does not fit, or it cannot be read.
    """
    if job.init.origin is None:
        return job
    from dept_ray.rounds.origin import begin

    return begin(job)
