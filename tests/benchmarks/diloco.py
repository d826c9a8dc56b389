"""DiLoCo (arXiv 2311.08105) over gloo, plainly: workers of one thread each. A side of `bench_peers`.

Every worker trains the bare loop on its own text; after each round the mean of their pseudo-gradients, by one
all-reduce of one flat vector, is what an outer Nesterov step moves all of them by. Nothing is saved, nothing survives
a worker, nobody joins: the least that there can be.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from bare import Loop, read_tokens
from ray_run import peak_mib
from reference import SIZES
from sides import Figures, serve

OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9


class Worker:
    """One of them."""

    def __init__(self, size_name: str, file: Path, rank: int, world: int, steps: int, way: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        self.size, self.steps, self.world, self.rank = SIZES[size_name], steps, world, rank
        self.loop = Loop(self.size, read_tokens(file, self.size), way)
        torch.manual_seed(rank)  # of the batches; the weights are the same everywhere
        self.parameters = list(self.loop.model.parameters())
        self.outer = torch.nn.utils.parameters_to_vector(self.parameters).detach().clone()
        self.outer_step = torch.optim.SGD([self.outer], OUTER_LR, OUTER_MOMENTUM, nesterov=True)

    def round(self) -> None:
        """Train, meet, step."""
        self.loop.steps(self.steps)
        gradient = self.outer - torch.nn.utils.parameters_to_vector(self.parameters).detach()
        dist.all_reduce(gradient)
        self.outer.grad = gradient / self.world
        self.outer_step.step()
        torch.nn.utils.vector_to_parameters(self.outer, self.parameters)

    def told(self, go: bool = False) -> bool:
        """Whether there is another round; worker 0 knows."""
        word = torch.tensor([int(go)])
        dist.broadcast(word, 0)
        return bool(word.item())


def get_ready(asked: argparse.Namespace) -> tuple[Figures, Callable[[], Figures]]:
    """Worker 0 starts the others and makes the first rounds with them."""
    began = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    world = len(asked.tokens)
    others = [
        subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)], stdin=subprocess.DEVNULL)
        for rank in range(1, world)
    ]
    worker = Worker(asked.size, asked.tokens[0], 0, world, asked.steps, asked.way)

    def one() -> float:
        begins = time.perf_counter()
        worker.told(True)
        worker.round()
        dist.barrier()
        return time.perf_counter() - begins

    one()
    first = time.perf_counter() - began
    one()
    parameters = worker.outer.numel()

    def measure() -> Figures:
        seconds = one()
        return {
            "tokens_per_s": round(world * asked.steps * worker.size.step_tokens / seconds, 1),
            "seconds": round(seconds, 3),
            # A ring passes each of K parts K - 1 times to be summed and K - 1 times to be told, from every worker.
            "sent_bytes": 2 * (world - 1) * parameters * 4,
            "silo_mib": sum(peak_mib(pid) for pid in [os.getpid(), *(other.pid for other in others)]),
            "loss": round(worker.loop.loss.item(), 3),
        }

    return {"first_round_s": round(first, 1), "parameters": parameters, "attention": asked.way}, measure


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", required=True, help="one file a worker")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--way", default="by 64 rows")
    parser.add_argument("--rank", type=int, default=0)
    asked = parser.parse_args(sys.argv[1:])
    if asked.rank:
        worker = Worker(asked.size, asked.tokens[asked.rank], asked.rank, len(asked.tokens), asked.steps, asked.way)
        while worker.told():
            worker.round()
            dist.barrier()
    else:
        serve(lambda: get_ready(asked))
        dist.broadcast(torch.tensor([0]), 0)
        dist.destroy_process_group()
