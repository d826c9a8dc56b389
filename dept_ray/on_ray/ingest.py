"""Ray Data runs the tasks of `text.prepare` next to each source's text: raw text to shards, on the silos' own nodes.

Every task reads and writes its source's storage and returns almost nothing; only the sample for a global tokenizer
travels. Tasks of sources with labels run on nodes with those labels.
"""

import pickle
from collections.abc import Callable
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import DeptError
from dept_ray.rounds.methods import resources_of
from dept_ray.text.prepare import RunAll, Task


def ray_data_runner(job: Job) -> RunAll:
    """A `RunAll` on this process's Ray cluster."""

    def run_all(work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]:
        import ray.data  # it takes most of a second, and in most starts nothing is due

        from dept_ray.on_ray.quiet import quiet_ray_data

        quiet_ray_data()
        by_labels: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for i, task in enumerate(tasks):
            labels = tuple(sorted(resources_of(job, task.source.name).labels.items()))
            by_labels.setdefault(labels, []).append(i)
        results: dict[int, Any] = {}
        for labels, numbers in by_labels.items():
            rows = [{"number": i, "task": pickle.dumps((work, tasks[i]))} for i in numbers]
            options: dict[str, Any] = {"label_selector": dict(labels)} if labels else {}
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_run, num_cpus=1, **options)
            for row in dataset.iter_rows():
                number, answer = pickle.loads(row["result"])
                if isinstance(answer, DeptError):
                    raise answer
                results[number] = answer
                done(len(results))
        return [results[i] for i in range(len(tasks))]

    return run_all


def _run(row: dict[str, Any]) -> dict[str, Any]:
    work, task = pickle.loads(row["task"])
    try:
        result = work(task)
    except DeptError as err:  # returned, not raised: Ray Data would bury it in a page of its own stack
        result = err
    return {"result": pickle.dumps((row["number"], result))}
