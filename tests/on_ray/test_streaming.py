"""Ray Data reads what the shards hold, in the order that was asked for; Ray's tasks prepare what a process would."""

import doctest
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from tiny import tiny_job

from dept_ray.config import Job
from dept_ray.errors import SourceError
from dept_ray.text.prepare import corpus_folder, prepare
from dept_ray.text.shards import open_corpus
from dept_ray.text.tasks import Task

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]


def test_ray_data_reads_the_same_bits_in_the_same_order(
    tiny: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dept_ray.on_ray import streaming

    job = tiny("spec-opt")
    corpus = open_corpus(corpus_folder(job, "code", "own"))
    monkeypatch.setattr(streaming, "_BLOCKS_PER_TASK", 50)  # several tasks, which may finish in any order
    blocks = np.random.default_rng(0).permutation(int(corpus.train.starts(32)[-1]))
    read = streaming.RayReader({"code": corpus}, 32)
    assert len(blocks) > 300
    np.testing.assert_array_equal(read("code", blocks), corpus.train.read(blocks, 32))


@pytest.mark.parametrize("kind", ["own", "global"])
def test_ray_prepares_the_same_corpus_as_one_process(tmp_path: Path, kind: str) -> None:
    from dept_ray.on_ray.ingest import ray_runner

    reports: list[tuple[str, int, int]] = []
    here, there = tiny_job(tmp_path / "here"), tiny_job(tmp_path / "there")
    prepare(here, kind)  # type: ignore[arg-type]
    prepare(there, kind, ray_runner(there), lambda *report: reports.append(report))  # type: ignore[arg-type]
    for source in here.sources:
        a, b = (open_corpus(corpus_folder(job, source.name, kind)) for job in (here, there))  # type: ignore[arg-type]
        assert a.fingerprint == b.fingerprint
        np.testing.assert_array_equal(a.counts, b.counts)
    assert ("pack", 6, 6) in reports
    assert {stage for stage, _, _ in reports} == {"clean", "learn", "pack", "index"}


def test_an_error_in_a_task_comes_back_as_our_own(tmp_path: Path) -> None:
    from dept_ray.on_ray.ingest import ray_runner

    job = tiny_job(tmp_path)
    (tmp_path / "text" / "code" / "paths" / "all.jsonl").write_text('{"txet": "no such column"}\n')
    with pytest.raises(SourceError, match="txet"):
        prepare(job, "own", ray_runner(job))


def test_tasks_run_beside_each_other_from_the_first_moment(tmp_path: Path) -> None:
    """Each ends when all have begun."""
    from dept_ray.on_ray.ingest import ray_runner

    job = tiny_job(tmp_path)
    tasks = [Task(source, tmp_path / source.name, tmp_path, job.tokenizer) for source in job.sources[:2]]
    everybody = [task.folder for task in tasks]

    def meet(task: Task) -> str:
        task.folder.touch()
        for _ in range(600):
            if all(folder.exists() for folder in everybody):
                return task.source.name
            time.sleep(0.1)
        return "alone"

    assert ray_runner(job)(meet, tasks, lambda done: None) == [task.source.name for task in tasks]


def test_processes_are_as_many_as_there_are_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a local Ray, whose CPUs are its silos, by this machine's cores."""
    from dept_ray.on_ray import ingest

    here = ray.get_runtime_context().get_node_id()
    nodes = [
        {"Alive": True, "NodeID": here, "Resources": {"CPU": 100.0}, "Labels": {"region": "eu"}},
        {"Alive": True, "NodeID": "b", "Resources": {"CPU": 6.0}, "Labels": {"region": "us"}},
        {"Alive": True, "NodeID": "c", "Resources": {}, "Labels": {"region": "us"}},
        {"Alive": False, "NodeID": "d", "Resources": {"CPU": 8.0}, "Labels": {"region": "us"}},
    ]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert ingest._cores(nodes, {}) == [2, 6, 0]
    assert ingest._cores(nodes, {"region": "us"}) == [6, 0]
    assert ingest._cores(nodes, {"region": "asia"}) == []
    assert doctest.testmod(ingest).failed == 0


def test_an_error_of_the_disk_comes_back_as_it_was(tmp_path: Path) -> None:
    from dept_ray.on_ray.ingest import ray_runner

    job = tiny_job(tmp_path)

    def full(task: Task) -> None:
        raise OSError(28, "No space left on device", "shard")

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'shard'$"):
        ray_runner(job)(full, [Task(job.sources[0], tmp_path, tmp_path, job.tokenizer)], lambda done: None)
