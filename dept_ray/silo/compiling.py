"""A loss that is compiled, and the first pass through it, which is when that happens.

What is compiled is a block, once for all of them, and one chunk of the loss. Not the body as one, whose loop over
blocks the compiler would unroll: at 24 layers that takes 54 s instead of 16, 4.8 instead of 2.9 from what is on disk,
and no step is faster. Not the two in one: it would unroll the loop over chunks too (8 of them took 19 s), and keeps
nothing on disk of a graph with a gradient of our own in it. And not the embedding: a block is the same for all
vocabularies.

Where a model is cut among ranks, hooks around a block's attention and around its MLP gather their shards; so it is
these two that are compiled, each once for all blocks, and a chunk of the loss.

Four silos that share two cores would all compile the same thing. So one does, and the others find it on disk.
"""

import ctypes
import fcntl
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import torch

from dept_ray.silo.loss import loss_of_chunk
from dept_ray.silo.model import LanguageModel

_LOOK_EVERY_S = 0.05

LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, T) ids and targets -> summed nats."""


OF_THE_COMPILER = r"The \.grad attribute of a Tensor that is not a leaf|TensorFloat32 tensor cores"
"""What torch warns of when its own compiler looks at the body's input, and where a GPU multiplies what is to be fp32 in
fp32."""


def compiled_loss(model: LanguageModel) -> LossOf:
    """As `model.loss`."""
    blocks = [torch.compile(block) for block in model.body.blocks]
    return partial(model.loss_by, partial(model.body.by, blocks), torch.compile(loss_of_chunk, dynamic=False))


def compiled_loss_of_cut(model: LanguageModel) -> LossOf:
    """As `model.loss`, of a model that is cut. What is within its hooks stays compiled."""
    for block in model.body.blocks:
        for part in (block.attention, block.mlp):
            part.forward = torch.compile(part.forward)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return partial(model.loss_by, model.body, torch.compile(loss_of_chunk, dynamic=False))


def compile_now(loss_of: LossOf, tensors: Sequence[torch.Tensor], batch: tuple[int, int], autocast: bool) -> None:
    """`first_pass`, of one process of this machine before the others."""
    with one_before_the_others():
        first_pass(loss_of, tensors, batch, autocast)


def first_pass(loss_of: LossOf, tensors: Sequence[torch.Tensor], batch: tuple[int, int], autocast: bool) -> None:
    """One pass, there and back, which changes nothing: gradients are left at zero.

    Args:
        loss_of: as `compiled_loss` makes it.
        tensors: parameters, with their gradients.
        batch: (B, T) of all passes to come.
        autocast: whether these compute in bf16.
    """
    device = tensors[0].device
    ids = torch.zeros(batch, dtype=torch.int64, device=device)
    load_in_this_process()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OF_THE_COMPILER)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss_of(ids, ids).backward()
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.zero_()


def load_in_this_process() -> None:
    """How torch's compiler finds out whether what it builds for a kind of vector unit can be loaded.

    It asks a new Python each time, a second of CPU in all before what is on disk is looked at. Here torch's libraries,
    which are the slow part, are loaded. (A private name of theirs: where it is another one, they ask.)
    """
    try:
        from torch._inductor.cpu_vec_isa import VecISA
    except ImportError:
        return

    def loads(self: VecISA, output_path: str) -> bool:
        try:
            ctypes.CDLL(output_path)
        except OSError:
            return False
        return True

    VecISA._probe_load = loads


@contextmanager
def one_before_the_others(lock: Path | None = None, patience_s: float = 300.0) -> Iterator[None]:
    """Whoever comes first on this machine goes alone; who comes meanwhile waits until it is out, and all go together.

    Args:
        lock: a file that all of them can write; None: one of this user's.
        patience_s: how long to wait: who is in may stand still.
    """
    until = time.monotonic() + patience_s
    with open(lock or Path(tempfile.gettempdir()) / f"dept-ray-compiles-{os.getuid()}", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            while time.monotonic() < until and not _is_free(file):
                time.sleep(_LOOK_EVERY_S)
        yield  # closing the file lets go, and so does dying


def _is_free(file: IO[str]) -> bool:
    """Whether nobody has locked it for itself."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True
