"""DiLoCo (arXiv 2311.08105) over gloo, plainly: workers of one thread each. A side of `bench_peers`.

Every worker trains the bare loop on its own text; after each round the mean of their pseudo-gradients, by one
all-reduce of one flat vector, is what an outer Nesterov step moves all of them by. Nothing is saved, nothing survives
a worker, nobody joins: the least that there can be. After a crash all are ended and begin again, as soon as torchrun
would see it.
"""

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from bare import Loop, read_tokens
from crash import kill_one, note_step
from ray_run import peak_mib
from reference import SIZES
from sides import SPEED, Figures, Ready, serve

OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9
LOOK_EVERY_S = 0.1
"""After a worker that is lost, as torchrun does by default."""


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

    def round(self, made: Callable[[], None] | None = None) -> None:
        """Train, meet, step; `made` is called after each step of its own."""
        self.loop.steps(self.steps, made)
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


def start(rank: int, *more: str) -> subprocess.Popen[bytes]:
    """One worker, of those that meet at `MASTER_PORT`."""
    return subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank), *more], stdin=subprocess.DEVNULL)


def meet_anew() -> None:
    """Where workers meet who are started from now on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


def let_go() -> None:
    """The others end, and nobody meets any more."""
    if dist.is_initialized():
        dist.broadcast(torch.tensor([0]), 0)
        dist.destroy_process_group()


def get_ready(asked: argparse.Namespace) -> Ready:
    """Worker 0 starts the others and makes the first rounds with them."""
    began, world = time.perf_counter(), len(asked.tokens)
    meet_anew()
    others = [start(rank) for rank in range(1, world)]
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

    about = {"first_round_s": round(first, 1), "parameters": parameters, "attention": asked.way}
    return about, {SPEED: measure, "crash": partial(measure_crash, asked)}


def measure_crash(asked: argparse.Namespace) -> Figures:
    """Kill one of workers that make round after round, each in a process of its own, worker 0 too."""
    let_go()
    asked.notes.mkdir(parents=True)
    with kept_going(len(asked.tokens)):
        return {**kill_one(asked.notes, "1", asked.steps), "rounds_lost": "all"}


@contextmanager
def kept_going(world: int) -> Iterator[None]:
    """Workers, all of whom are ended and started anew, at once, when one is lost."""
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            meet_anew()
            workers = [start(rank, "--under", str(os.getpid())) for rank in range(world)]
            while not over.wait(LOOK_EVERY_S) and all(worker.poll() is None for worker in workers):
                pass
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", required=True, help="one file a worker")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder for the notes of steps around a crash")
    parser.add_argument("--way", default="by 64 rows")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--under", type=int, help="make rounds unasked, and note each step, while this is the parent")
    asked = parser.parse_args(sys.argv[1:])
    if asked.rank is None:
        serve(lambda: get_ready(asked))
        let_go()
    else:
        made = partial(note_step, asked.notes, str(asked.rank)) if asked.under else None
        worker = Worker(asked.size, asked.tokens[asked.rank], asked.rank, len(asked.tokens), asked.steps, asked.way)
        while os.getppid() == asked.under if asked.under else worker.told():
            worker.round(made)
            dist.barrier()
