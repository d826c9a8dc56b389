"""Flower's simulation engine (FedAvg) on the same model and text. A side of `bench_peers`, in a venv of its own.

Its engine gives each round's clients to processes that it keeps, one CPU each; a client keeps its loop (and so its
compilation) in the process that it lands in, which is the best that can be done with it. Rounds are let through one by
one, by a strategy that waits. After a crash the engine is left alone, and rounds are let through as before.
"""

import argparse
import os
import queue
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from bare import Loop, read_tokens
from crash import kill_one, note_step
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from ray_run import peak_mib
from reference import SIZES
from sides import SPEED, Figures, Ready, serve

_kept: dict[str, Loop] = {}
"""In a client's process."""


def loop_of(size: str, file: str, way: str) -> Loop:
    """Made once a process and source."""
    if file not in _kept:
        torch.set_num_threads(1)
        _kept[file] = Loop(SIZES[size], read_tokens(Path(file), SIZES[size]), way)
    return _kept[file]


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """A client's part of a round."""
    config: Any = message.content["config"]
    partition = int(str(context.node_config["partition-id"]))
    loop = loop_of(config["size"], config["tokens"].split("|")[partition], config["way"])
    arrays: Any = message.content["arrays"]
    loop.model.load_state_dict(arrays.to_torch_state_dict())
    loop.steps(config["steps"], partial(note_step, Path(config["notes"]), str(partition)))
    tokens = config["steps"] * loop.size.step_tokens
    metrics = MetricRecord({"num-examples": tokens, "train_loss": loop.loss.item()})
    content = RecordDict({"arrays": ArrayRecord(loop.model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Waiting(FedAvg):
    """FedAvg whose rounds begin when they are asked for."""

    go: "queue.Queue[None]" = queue.Queue()
    done: "queue.Queue[int]" = queue.Queue()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self.go.get()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        failed = [reply.error for reply in replies if reply.has_error()]
        result = super().aggregate_train(server_round, replies)
        self.done.put(len(failed))
        return result


def get_ready(asked: argparse.Namespace) -> Ready:
    """Start the engine and make the first rounds."""
    began, size, clients = time.perf_counter(), SIZES[asked.size], len(asked.tokens)
    server = ServerApp()
    asked.notes.mkdir(parents=True)
    told = {"size": asked.size, "tokens": "|".join(map(str, asked.tokens)), "way": asked.way, "steps": asked.steps,
            "notes": str(asked.notes)}  # fmt: skip

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        fresh = Loop(size, torch.zeros(1, size.context + 1, dtype=torch.int32), asked.way)
        strategy = Waiting(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients,
                           min_available_nodes=clients)  # fmt: skip
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(fresh.model.state_dict()), num_rounds=1000,
            train_config=ConfigRecord(told),
        )  # fmt: skip

    # A Ray of its own: it would join any other that it finds on this machine.
    init: dict[str, Any] = {"address": "local", "num_cpus": clients, "include_dashboard": False}
    backend = {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}

    def simulate() -> None:
        try:
            run_simulation(server, client, clients, backend_config=backend)  # pyright: ignore[reportArgumentType]
        finally:
            Waiting.done.put(clients)  # it has ended, and so no round will

    threading.Thread(target=simulate, daemon=True).start()

    def one() -> float:
        begins = time.perf_counter()
        Waiting.go.put(None)
        if failed := Waiting.done.get(timeout=900):
            raise SystemExit(f"Flower: {failed} clients failed: see above")
        return time.perf_counter() - begins

    one()
    first = time.perf_counter() - began
    one()
    bytes_one_way = sum(4 * p.numel() for p in Loop(size, torch.zeros(1, 1), asked.way).model.parameters())

    def measure() -> Figures:
        seconds = one()
        return {
            "tokens_per_s": round(clients * asked.steps * size.step_tokens / seconds, 1),
            "seconds": round(seconds, 3),
            "sent_bytes": 2 * clients * bytes_one_way,
            "silo_mib": sum(peak_mib(pid) for pid in client_processes()),
        }

    import flwr

    about = {"first_round_s": round(first, 1), "flwr": flwr.__version__}
    return about, {SPEED: measure, "crash": partial(measure_crash, asked)}


def measure_crash(asked: argparse.Namespace) -> Figures:
    """Kill the process of a client while rounds follow each other."""
    over, failed = threading.Event(), list[int]()

    def rounds() -> None:
        while not over.is_set():
            Waiting.go.put(None)
            failed.append(Waiting.done.get(timeout=900))

    letting = threading.Thread(target=rounds)
    letting.start()
    try:
        figures = kill_one(asked.notes, "1", asked.steps)
    finally:
        over.set()
        letting.join()
    # What was answered counts, and a round of which nothing was is made again.
    return {**figures, "rounds_lost": failed.count(len(asked.tokens))}


def client_processes() -> list[int]:
    """Ray's workers below this process that run its clients."""
    from text_side import family

    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family()}
    return [pid for pid, name in names.items() if b"ClientAppActor" in name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder for the notes of steps")
    parser.add_argument("--way", default="by 64 rows")
    serve(lambda: get_ready(parser.parse_args(sys.argv[1:])))
    ray.shutdown()
    os._exit(0)  # its engine's threads wait for rounds that will not come
