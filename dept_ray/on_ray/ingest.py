"""Ray runs the tasks of `text.prepare` next to each source's text: raw text to shards, on the silos' own nodes.

Every task reads and writes its source's storage and returns almost nothing; only the sample for a global tokenizer
travels. Tasks of sources with labels run on nodes with those labels.

Plain tasks, not a dataset of Ray Data: nothing flows here that it could stream, and its executor lets one task run at
a time for a dataset's first second, for it has not heard of its share of the cluster yet, and sees up to two tenths
of a second late that one has ended, for it waits for all that run.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from dept_ray.config import Job
from dept_ray.errors import DeptError
from dept_ray.on_ray.cluster import has_labels
from dept_ray.rounds.methods import resources_of
from dept_ray.text.prepare import RunAll
from dept_ray.text.tasks import MANY_THREADED, Task

_THREADS = 4
"""Of a process whose task uses cores by itself, where there are tasks enough. More would wait for the Python between
batches; one each would keep a vocabulary per core in the caches: on two cores, two processes are a seventh slower."""
_LOOK_EVERY_S = 2.0
"""For nodes that have come."""


@dataclass
class _Queue:
    """Tasks, by number, for nodes with the same labels."""

    labels: dict[str, str]
    waiting: deque[int] = field(default_factory=deque)
    running: int = 0


def ray_runner(job: Job) -> RunAll:
    """A `RunAll` on this process's Ray cluster."""

    def run_all(work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]:
        threads = max(_THREADS, sum(_cores(ray.nodes(), {})) // max(1, len(tasks))) if work in MANY_THREADED else 1
        queues = dict[tuple[tuple[str, str], ...], _Queue]()
        for number, task in enumerate(tasks):
            labels = resources_of(job, task.source.name).labels
            queues.setdefault(tuple(sorted(labels.items())), _Queue(labels)).waiting.append(number)
        running, results = dict[Any, tuple[int, _Queue]](), dict[int, Any]()
        try:
            while len(results) < len(tasks):
                nodes = ray.nodes()  # anew each time: a cluster grows
                for queue in queues.values():
                    places = _places(_cores(nodes, queue.labels), threads)
                    while queue.waiting and queue.running < places:
                        number = queue.waiting.popleft()
                        start = _run.options(scheduling_strategy="SPREAD", label_selector=queue.labels or None)
                        running[start.remote(work, tasks[number], threads)] = number, queue
                        queue.running += 1
                for ref in ray.wait(list(running), timeout=_LOOK_EVERY_S)[0]:
                    number, queue = running.pop(ref)
                    queue.running -= 1
                    results[number] = _result(ref)
                    done(len(results))
        finally:
            for ref in running:  # of a source that cannot be prepared, or of one who gave up waiting
                ray.cancel(ref)
        return [results[number] for number in range(len(tasks))]

    return run_all


def _cores(nodes: list[dict[str, Any]], labels: dict[str, str]) -> list[int]:
    """Of each node with these labels that is there by now. A Ray of this process's own counts CPUs by its silos."""
    here, mine = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    told = [
        (node["NodeID"], int(node["Resources"].get("CPU", 0)))
        for node in nodes
        if node["Alive"] and has_labels(node, labels)
    ]
    return [min(cpus, mine) if node == here else cpus for node, cpus in told]


def _places(cores: list[int], threads: int) -> int:
    """Processes of so many threads that keep all cores busy; one at least, which waits for a node if there is none.

    >>> _places([6, 2, 0], 4), _places([6, 2, 0], 1), _places([], 4)
    (3, 8, 1)
    """
    return max(1, sum(-(-each // threads) for each in cores))


@ray.remote(num_cpus=1)
def _run(work: Callable[[Task], Any], task: Task, threads: int) -> Any:
    os.environ["RAYON_NUM_THREADS"] = str(min(threads, os.cpu_count() or 1))  # read when tokenizers first works here
    return work(task)


def _result(ref: "ray.ObjectRef[Any]") -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as err:
        if isinstance(err.cause, DeptError | OSError):
            raise err.cause from None
        raise
