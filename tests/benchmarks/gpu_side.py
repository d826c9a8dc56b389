"""The inner steps of one silo on a GPU, on tokens drawn at random: a side of `bench_gpu`. It needs no Ray and no text.

All that a silo does between two messages is done as it does it, by its own learner, compiled loss, optimizer and step.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from sides import SPEED, Figures, Ready, serve

from dept_ray.draws import generator
from dept_ray.jobfile import parse_job
from dept_ray.rounds.pool import specs_of
from dept_ray.silo.flops import flops_per_token
from dept_ray.silo.fresh import fresh_body, fresh_embedding
from dept_ray.silo.hardware import choose_hardware
from dept_ray.silo.inner import Schedule, train_steps
from dept_ray.silo.learner import Learner
from dept_ray.silo.micro_batch import find_micro_batch
from dept_ray.silo.team import ALONE
from dept_ray.silo.trainee import Trainees
from dept_ray.text.tokenizer import Vocabulary


def get_ready(asked: argparse.Namespace) -> Ready:
    """A fresh model, its first pass made."""
    gpu = torch.cuda.is_available()
    job = parse_job({
        "name": "gpu", "method": asked.method,
        "model": {"layers": asked.layers, "width": asked.width, "heads": asked.heads},
        "sources": [{"name": "drawn", "kind": "installed", "collection": "python"}],
        "tokenizer": {"vocab_size": asked.vocabulary},
        "inner": {
            "local_steps": asked.steps, "batch_size": asked.batch, "context": asked.context, "precision": "bf16",
            "micro_batch": asked.at_once, "warmup_steps": 1, "compile": "always",
        },
    })  # fmt: skip
    (spec,) = specs_of(job).values()
    learner = Learner(job, spec, choose_hardware(job, spec.threads, gpu, gpu), asked.vocabulary)
    learner.body.copy_(fresh_body(job))
    learner.model.embedding.load_state_dict(fresh_embedding(job, Vocabulary(asked.vocabulary), "gpu").state_dict())
    draw = generator("gpu", 0)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(asked.steps):
            yield draw.integers(asked.vocabulary, size=(asked.batch, asked.context + 1), dtype=np.uint32)

    fitting = find_micro_batch(learner.model, learner.optimizer.tensors, job, learner.hardware, 1.0) if gpu else 0
    began = time.perf_counter()
    with Trainees(learner).of(ALONE) as trainee:
        if trainee.to_compile:
            trainee.compile()
        compiling = time.perf_counter() - began

        def measure() -> Figures:
            drawn = list(batches())
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            trained = train_steps(
                trainee.model, trainee.loss_of, trainee.optimizer, drawn, job=job, hardware=learner.hardware,
                schedule=Schedule(0, asked.steps, asked.steps, 1e-4, 1, 0.1), should_stop=lambda: False,
                watch=lambda *_: None,
            )  # fmt: skip
            tokens_per_s = trained.tokens / (time.perf_counter() - began)  # losses were read, so the GPU is done
            return {
                "tokens_per_s": round(tokens_per_s, 1),
                "flops_per_s": tokens_per_s * flops_per_token(job.model, asked.context, asked.vocabulary),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
                "loss": round(trained.losses[-1], 3),
            }

        measure()  # the moments' memory, and what only the first steps do
    about = {
        "hardware": str(learner.hardware),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "peak_flops": learner.hardware.peak_flops,
        "compiling_s": round(compiling, 1),
        "sequences that fit": fitting,
    }
    return about, {SPEED: measure}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", required=True)
    for name in ("layers", "width", "heads", "context", "vocabulary", "batch", "at-once", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    serve(lambda: get_ready(parser.parse_args(sys.argv[1:])))
