"""A region on its own Ray cluster: `rounds.agent` with `RayPool` for its pool and Ray tasks for its text."""

import os
from collections.abc import Callable, Mapping

from dept_ray.config import Job
from dept_ray.on_ray.cluster import check_room, connect
from dept_ray.on_ray.ingest import ray_runner
from dept_ray.on_ray.pool import RayPool
from dept_ray.rounds.agent import Agent
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.methods import method_of
from dept_ray.text.prepare import prepare, tokenizer_kind


def region_on_ray(
    mailbox: str, labels: Mapping[str, str], address: str | None, folder: str | None, tell: Callable[[str], None]
) -> Agent:
    """An agent whose silos are children of this process, on the cluster that it joins.

    Raises:
        ConfigError: the mailbox is no place for letters.
        ClusterError: nothing answers at the address.
    """
    box = Mailbox(mailbox)
    connect(address)
    return Agent(box, labels, lambda: RayPool(os.cpu_count()), _prepare, folder=folder, tell=tell)


def _prepare(job: Job) -> None:
    """On Ray, next to the text; first see that the region can hold the silos at all.

    Raises:
        ClusterError: it cannot.
        DataError: the text cannot be prepared.
    """
    check_room(job)  # a task for labels that no node has would wait for ever
    prepare(job, tokenizer_kind(method_of(job).vocabulary), ray_runner(job))
