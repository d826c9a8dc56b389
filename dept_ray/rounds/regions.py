"""Which silo belongs to which region, and what a job is there: pure facts, before any letter is written.

A region bears labels, and a silo belongs to it where its own labels (`resources.labels`) have them all. To its agent a
job is the same job with those sources alone: everything that a silo computes follows from its own source.
"""

from collections.abc import Callable, Mapping

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.rounds.methods import method_of, resources_of

Serves = Callable[[Job, str], bool]
"""Whether a region has a source's silo."""


def by_labels(labels: Mapping[str, str]) -> Serves:
    """The region that bears these labels; one without labels has every silo."""

    def serves(job: Job, source: str) -> bool:
        return labels.items() <= resources_of(job, source).labels.items()

    return serves


def region_name(labels: Mapping[str, str]) -> str:
    """What a region is called in its mailbox.

    >>> region_name({"region": "eu", "market": "spot"})
    'spot-eu'
    """
    return "-".join(labels[key] for key in sorted(labels)) or "everywhere"


def job_of_region(job: Job, serves: Serves, labels: Mapping[str, str], folder: str | None = None) -> Job:
    """The job as one region has it: its own sources alone, which ask for no label that all of the region bears.

    Args:
        folder: of the region, for sources without a `storage`; None: the job's.
    """
    sources = []
    for source in job.sources:
        if serves(job, source.name):
            wish = resources_of(job, source.name)
            asked = {key: value for key, value in wish.labels.items() if labels.get(key) != value}
            sources.append(source.model_copy(update={"resources": wish.model_copy(update={"labels": asked})}))
    rounds = job.rounds.model_copy(update={"choose": None})  # of all silos; here there may be fewer
    changes = {"sources": tuple(sources), "rounds": rounds, "folder": folder or job.folder}
    return job.model_copy(update=changes)


def check_regions(job: Job) -> None:
    """Refuse what cannot be done between regions, before anything is spent; nothing, where all is in one place.

    Raises:
        ConfigError: one silo draws from all sources, a tokenizer would be trained on all of them, or a silo would have
            to read what another run left.
    """
    if job.regions.mailbox is None:
        return
    method = method_of(job)
    if method.mixed:
        raise ConfigError(
            f'regions.mailbox = "{job.regions.mailbox}": method = "{job.method}" trains one silo on the text of all '
            "sources, which would have to leave their regions; choose another method, or leave the mailbox out"
        )
    if job.init.origin is not None and (job.init.embedding != "random" or not method.share_body):
        raise ConfigError(
            f"{job.init.told}: behind a mailbox a silo cannot read what the run begins from, which is on the "
            'coordinator\'s disk; only a shared body comes to it, with its orders: set init.embedding = "random" '
            "and choose a method that shares the body, or leave the mailbox out"
        )
    if job.faults.newcomer_rows != "random":
        raise ConfigError(
            f'faults.newcomer_rows = "{job.faults.newcomer_rows}": behind a mailbox nobody knows which silos live '
            'in one place, and rows never leave theirs; set it to "random", or leave the mailbox out'
        )
    if method.vocabulary != "own" and job.tokenizer.kind in ("bpe", "unigram"):
        raise ConfigError(
            f'tokenizer.kind = "{job.tokenizer.kind}": method = "{job.method}" has one tokenizer for all sources, and '
            "behind a mailbox nobody sees the text of all to train it; train it beforehand and name it in each region "
            '(tokenizer.kind = "file" and tokenizer.name, or "hub"), or choose method = "spec-opt"'
        )
