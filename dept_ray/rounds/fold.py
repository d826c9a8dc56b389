"""The weighted mean of deltas in one pass over memory, and what is to become of it while a piece of it is in cache.

A body is as long as memory is wide: each pass over it that is saved, and each core that helps, shortens the pause
between two rounds. Threads share the vector out once and meet at its end; values are folded in silo-name order whatever
their number, so the bits are those of one thread. Knows nothing of what a delta is of.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dept_ray.codec import Coded
from dept_ray.messages import Delta, Held, fetched

PIECE = 1 << 17
"""Values at a time: what is folded stays in cache, and Python's part in it is small."""
_AT_ONCE = 8
"""Deltas folded in one pass over the sum: more of them save little of its traffic, and cost memory."""
_THREADS = min(4, os.cpu_count() or 1)
"""Memory is the limit, and a few cores reach it."""

Use = Callable[[slice, np.ndarray, np.ndarray], None]
"""What becomes of a piece of the mean: where it is of the whole, the piece, in its place, and room for as many values.
Called from several threads, for each piece once."""


def weighted_mean(
    deltas: Mapping[str, Delta | Held], weights: Mapping[str, float], use: Use = lambda *piece: None
) -> np.ndarray:
    """sum_k w_k d_k over flat vectors of one length, folded in silo-name order: (n,) fp32, or what `use` made of it.

    >>> weighted_mean({"b": np.float32([4, 0]), "a": np.float32([0, 8])}, {"a": 0.25, "b": 0.75}).tolist()
    [3.0, 2.0]
    """
    total, left = None, sorted(deltas)
    assert left, "a round that nobody answered does not count"
    while left:
        some, left = left[:_AT_ONCE], left[_AT_ONCE:]
        weighted = [(fetched(deltas[name]), np.float32(weights[name])) for name in some]
        total = _folded(total, weighted, None if left else use)
        del weighted  # before the next are looked at
    assert total is not None
    return total


def _folded(total: np.ndarray | None, weighted: Sequence[tuple[Delta, np.float32]], use: Use | None) -> np.ndarray:
    """The sum with some more, in place."""
    begun, sums = total is not None, np.empty(weighted[0][0].shape, np.float32) if total is None else total

    def fold(starts: range) -> None:
        room = np.empty(PIECE, np.float32)
        for start in starts:
            here = slice(start, min(start + PIECE, len(sums)))
            piece, product = sums[here], room[: here.stop - start]
            for number, (delta, weight) in enumerate(weighted):
                part = delta.piece(here.start, here.stop) if isinstance(delta, Coded) else delta[here]
                if number or begun:
                    piece += np.multiply(part, weight, out=product)
                else:
                    np.multiply(part, weight, out=piece)
            if use is not None:
                use(here, piece, product)

    _share_out(range(0, len(sums), PIECE), fold)
    return sums


def _share_out(starts: range, work: Callable[[range], None]) -> None:
    """Do it in threads, each on a stretch of its own."""
    threads = min(_THREADS, len(starts) // 8)  # a thread for less costs more than it helps
    if threads < 2:
        work(starts)
        return
    each = -(-len(starts) // threads)
    with ThreadPoolExecutor(threads, thread_name_prefix="fold") as pool:
        list(pool.map(work, (starts[first : first + each] for first in range(0, len(starts), each))))
