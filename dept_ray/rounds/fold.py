"""The weighted mean of deltas in one pass over memory, and what is to become of it while a piece of it is in cache.

A body is as long as memory is wide: each pass over it that is saved, and each core that helps, shortens the pause
between two rounds. Threads share the vector out once and meet at its end; values are folded in silo-name order whatever
their number, so the bits are those of one thread. Knows nothing of what a delta is of.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dept_ray import draws
from dept_ray.codec import Coded
from dept_ray.messages import Delta, Held, fetched

PIECE = 4 * draws.PIECE
"""Values at a time: what is folded stays in cache, and threads seldom wait for each other's Python."""
_AT_ONCE = 8
"""Deltas folded in one pass over the sum: more of them save little of its traffic, and cost memory."""
_THREADS = min(4, os.cpu_count() or 1)
"""Memory is the limit, and a few cores reach it."""

Use = Callable[[slice, torch.Tensor, torch.Tensor], None]
"""What becomes of a piece of the mean: where it is of the whole, the piece, in its place, and room for as many values.
Called from several threads, for each piece once."""


def weighted_mean(
    deltas: Mapping[str, Delta | Held], weights: Mapping[str, float], use: Use = lambda *piece: None
) -> torch.Tensor:
    """sum_k w_k d_k over flat vectors of one length, folded in silo-name order: (n,) fp32, or what `use` made of it.

    >>> weighted_mean({"b": np.float32([4, 0]), "a": np.float32([0, 8])}, {"a": 0.25, "b": 0.75}).tolist()
    [3.0, 2.0]
    """
    total, left = None, sorted(deltas)
    assert left, "a round that nobody answered does not count"
    while left:
        some, left = left[:_AT_ONCE], left[_AT_ONCE:]
        weighted = [(_readable(fetched(deltas[name])), float(np.float32(weights[name]))) for name in some]
        total = _folded(total, weighted, None if left else use)
        del weighted  # before the next are looked at
    assert total is not None
    return total


def _folded(
    total: torch.Tensor | None, weighted: Sequence[tuple[torch.Tensor | Coded, float]], use: Use | None
) -> torch.Tensor:
    """The sum with some more, in place."""
    begun, sums = total is not None, empty(weighted[0][0].shape) if total is None else total

    def fold(starts: range) -> None:
        room = empty(PIECE)
        for start in starts:
            here = slice(start, min(start + PIECE, len(sums)))
            piece = sums[here]
            for number, (delta, weight) in enumerate(weighted):
                part = torch.from_numpy(delta.piece(start, here.stop)) if isinstance(delta, Coded) else delta[here]
                if number or begun:
                    piece.add_(part, alpha=weight)
                else:
                    torch.mul(part, weight, out=piece)
            if use is not None:
                use(here, piece, room[: len(piece)])

    _share_out(range(0, len(sums), PIECE), fold)
    return sums


def empty(shape: int | Sequence[int]) -> torch.Tensor:
    """By numpy, which asks for memory in huge pages: torch's takes a coordinator's thread a page fault for 4 KiB."""
    return torch.from_numpy(np.empty(shape, np.float32))


def _readable(delta: Delta) -> torch.Tensor | Coded:
    """Copied only if it is packed. Ray's arrays are only to be read, which torch warns of; nobody writes here."""
    if isinstance(delta, Coded):
        return delta.opened()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(delta)


def _share_out(starts: range, work: Callable[[range], None]) -> None:
    """Do it in threads, each on a stretch of its own."""
    threads = min(_THREADS, len(starts) // 2)  # a thread for less costs more than it helps
    if threads < 2:
        work(starts)
        return
    each = -(-len(starts) // threads)
    usual = torch.get_num_threads()
    try:  # each of one core: torch would divide every piece once more
        with ThreadPoolExecutor(threads, "fold", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, (starts[first : first + each] for first in range(0, len(starts), each))))
    finally:
        torch.set_num_threads(usual)  # of threads that come after, too
