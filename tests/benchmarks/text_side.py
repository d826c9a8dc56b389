"""Ways through text, one a process: raw tokenising, ours, ours on Ray, a silo's stream. Sides of `bench_text`."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference import SIZES, Size, text_job
from sides import SPEED, Figures, Ready, serve

from dept_ray.config import Job
from dept_ray.text.prepare import RunAll, corpus_folder, run_here, text_folder
from dept_ray.text.shards import open_corpus
from dept_ray.text.tasks import Task, pack, read_part, text_parts
from dept_ray.text.tokenizer import open_tokenizer


def raw(job: Job) -> Ready:
    """`encode_batch_fast` on text in memory, a part at a time, nothing done with what comes out."""
    source = job.sources[0]
    folder = text_folder(job, source)
    tokenizer = open_tokenizer(corpus_folder(job, source.name, "own") / "tokenizer.json")
    parts = [list(read_part(folder / f"{name}.parquet")) for name in text_parts(folder)]

    def encode() -> int:
        return sum(
            len(each) for texts in parts for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        )

    text_bytes = sum(len(text.encode()) for texts in parts for text in texts)
    return {"text_bytes": text_bytes}, {SPEED: lambda: counted(encode)}


def ours(job: Job, run_all: RunAll) -> Ready:
    """`pack`: from text parts on disk to shards on disk, counted, with checksums."""
    source = job.sources[0]
    known = corpus_folder(job, source.name, "own")
    folder = known.with_name(f"bench-{os.getpid()}")
    tasks = [
        Task(source, folder, text_folder(job, source), job.tokenizer, part=name)
        for name in text_parts(text_folder(job, source))
    ]
    corpus = open_corpus(known)
    tokens = corpus.train.tokens + corpus.validation.tokens

    def pack_all() -> int:
        folder.mkdir()
        shutil.copy(known / "tokenizer.json", folder)
        run_all(pack, tasks, lambda done: None)
        return tokens

    def measure() -> Figures:
        try:
            return counted(pack_all)
        finally:
            shutil.rmtree(folder)

    return {"parts": len(tasks)}, {SPEED: measure}


def on_ray(job: Job) -> Ready:
    """The same as tasks on Ray, as `dept-ray prepare` does it."""
    from dept_ray.on_ray.cluster import connect
    from dept_ray.on_ray.ingest import ray_runner

    connect()
    about, measures = ours(job, ray_runner(job))
    measures[SPEED]()  # its worker processes start with the first tasks
    return about, measures


def stream(job: Job, size: Size) -> Ready:
    """A silo's batches through Ray Data: windows of text, drained as fast as they come."""
    import ray

    from dept_ray.on_ray.cluster import connect
    from dept_ray.on_ray.streaming import RayReader
    from dept_ray.text.stream import WINDOW_STEPS, MixedStream, Stream

    connect()
    name = job.sources[0].name
    corpus = open_corpus(corpus_folder(job, name, "own"))
    blocks = int(corpus.train.starts(size.context)[-1])
    batches = MixedStream(
        {name: Stream(name, blocks, 0)}, {name: 1.0}, size.batch, size.context, 0,
        RayReader({name: corpus}, size.context),
    )  # fmt: skip
    at = batches.start()

    def drain() -> int:
        nonlocal at
        for batch in batches.batches(at, 4 * WINDOW_STEPS):
            corpus.vocabulary.to_local(batch)
        at = batches.advance(at, 4 * WINDOW_STEPS)
        return 4 * WINDOW_STEPS * size.step_tokens

    counted(drain)
    return {"ray": ray.__version__}, {SPEED: lambda: counted(drain)}


def counted(work: Callable[[], int]) -> Figures:
    """Tokens per second, and CPU seconds per million tokens of this process and all below it."""
    before, began = cpu_of_family(), time.perf_counter()
    tokens = work()
    seconds, cpu_s = time.perf_counter() - began, cpu_of_family() - before
    return {"tokens_per_s": round(tokens / seconds), "cpu_s_per_mtoken": cpu_s / tokens * 1e6}


def cpu_of_family() -> float:
    """CPU seconds of this process and all that it started, as long as they live."""
    return sum(family().values())


def family() -> dict[int, float]:
    """CPU seconds so far, by process id, of this process and all that it started."""
    parents, cpu = dict[int, int](), dict[int, float]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields: list[Any] = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(stat.parent.name)
        parents[pid], cpu[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: cpu.get(pid, 0.0) for pid in below}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("raw", "ours", "ray", "stream"))
    parser.add_argument("--size", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args(sys.argv[1:])
    size = SIZES[asked.size]
    job = text_job(size, asked.folder)
    ways: dict[str, Callable[[], Ready]] = {
        "raw": lambda: raw(job),
        "ours": lambda: ours(job, run_here),
        "ray": lambda: on_ray(job),
        "stream": lambda: stream(job, size),
    }
    serve(ways[asked.way])
