"""Which tokens a position names: batches as a function of (seed, source, epoch, position), with no state of their own.

A *position* is the number of blocks already trained, per source; it is committed with the round, so a resumed, moved or
replayed silo reads exactly what it would have read. Within an epoch the blocks come in a permutation drawn from labels.
One source is a mixture of one: `MixedStream` draws each row's source with p_k proportional to n_k ** tau.

Reading is an argument: `read(source, blocks)` is `Shards.read` in process and a bounded Ray Data dataset on a
cluster (`on_ray.streaming`), with the same bits. What is next is read, a window at a time, in a background thread; only
what is waited for, at the start or after a jump, is a few batches read directly.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dept_ray.draws import generator
from dept_ray.errors import ShardError

Position = dict[str, int]
Read = Callable[[str, np.ndarray], np.ndarray]
"""(source, (n,) block numbers) -> (n, context + 1) token ids."""
WINDOW_BYTES, WINDOW_STEPS = 64 << 20, 256
"""What is read at once: no more than this, at two bytes a token, and no more batches. Windows know nothing of rounds:
a short one takes the next of what is there."""
WAITED_FOR_STEPS = 32
"""Batches in a window that is waited for: Ray Data takes seconds to its first token, which are then trained away."""


class Stream:
    """The order of one source's blocks, for ever."""

    def __init__(self, source: str, num_blocks: int, seed: int) -> None:
        if num_blocks < 1:
            raise ShardError(
                f'source "{source}" has no whole block of the context: lower inner.context or give it more text'
            )
        self.source, self.num_blocks, self.seed = source, num_blocks, seed
        self._latest = (-1, np.empty(0, np.int64))

    def blocks(self, position: int, count: int) -> np.ndarray:
        """Block numbers at positions [position, position + count): (count,) int64, across epochs."""
        pieces = [np.empty(0, np.int64)]
        while count > 0:
            epoch, start = divmod(position, self.num_blocks)
            piece = self._order_of(epoch)[start : start + count]
            pieces.append(piece)
            position, count = position + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _order_of(self, epoch: int) -> np.ndarray:
        # One tuple, replaced whole: the background reader and the trainer may ask for two epochs at once.
        latest, order = self._latest
        if latest != epoch:
            order = generator(self.seed, "order", self.source, epoch).permutation(self.num_blocks)
            self._latest = (epoch, order)
        return order


@dataclass(frozen=True)
class _Window:
    """Batches in memory, one after the other."""

    positions: np.ndarray
    """(steps + 1, sources): where each begins, and the last one ends."""
    tokens: np.ndarray
    """(steps, B, T + 1), as stored."""

    def find(self, position: np.ndarray) -> int | None:
        """Which batch begins at a position (sources,); None if none does."""
        (found,) = np.nonzero((self.positions[:-1] == position).all(axis=1))
        return int(found[0]) if len(found) else None


class MixedStream:
    """Batches drawn from one or several sources.

    Args:
        streams: by source name, in the job's order.
        weights: unnormalised p_k by source name.
        batch_size: B, rows per batch.
        context: T.
        seed: of the draws.
        read: how blocks become tokens; called from a background thread.
        read_now: the same, for one who waits; None: `read`.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        weights: Mapping[str, float],
        batch_size: int,
        context: int,
        seed: int,
        read: Read,
        read_now: Read | None = None,
    ) -> None:
        self.streams, self.names = dict(streams), list(streams)
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.read, self.read_now = read, read_now or read
        p = np.array([weights[name] for name in self.names], dtype=np.float64)
        self._edges = np.cumsum(p / p.sum())[:-1]
        self._window: _Window | None = None
        self._ahead: tuple[Position, Future[_Window]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def start(self) -> Position:
        """The position of one who has read nothing."""
        return dict.fromkeys(self.names, 0)

    def epochs(self, position: Position) -> dict[str, float]:
        """How often each source has been read."""
        return {name: position[name] / stream.num_blocks for name, stream in self.streams.items()}

    def advance(self, position: Position, steps: int) -> Position:
        """The position after that many batches."""
        drawn = np.bincount(self._draws(position, steps), minlength=len(self.names))
        return {name: position[name] + int(n) for name, n in zip(self.names, drawn, strict=True)}

    def batches(self, position: Position, steps: int) -> Iterator[np.ndarray]:
        """`steps` batches from a position on: (B, T + 1) token ids each, as stored.

        Raises:
            ShardError: what is stored cannot be read.
        """
        while steps > 0:
            window, first = self._window_with(position)
            count = min(steps, len(window.tokens) - first)
            position, steps = self._named(window.positions[first + count]), steps - count
            for number, batch in enumerate(window.tokens[first : first + count], first):
                if number or len(window.tokens) == 1:  # a first step does not share its cores with what is for later
                    self._read_ahead(window)
                yield batch

    def close(self) -> None:
        """Stop reading ahead; the thread ends with the window that it is reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _window_with(self, position: Position) -> tuple["_Window", int]:
        """The window that holds the batch at a position, and its place in it."""
        if self._window is not None and (place := self._window.find(self._array(position))) is not None:
            return self._window, place
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            self._window = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()  # nobody will ask for it
            self._window = self._read(position, self.read_now, WAITED_FOR_STEPS)
        return self._window, 0

    def _read_ahead(self, window: "_Window") -> None:
        """Begin to read what follows a window, unless that has begun."""
        if self._ahead is None:
            next_up = self._named(window.positions[-1])
            self._ahead = (next_up, self._thread.submit(self._read, next_up, self.read, WINDOW_STEPS))

    def _read(self, position: Position, read: Read, most: int) -> "_Window":
        """As many batches as a window holds: each source's share in one read, laid out by the draws."""
        steps = max(1, min(most, WINDOW_BYTES // (self.batch_size * (self.context + 1) * 2)))
        draws = self._draws(position, steps)
        drawn = np.stack([(draws == i).reshape(steps, -1).sum(1) for i in range(len(self.names))], axis=1)
        positions = np.cumsum(np.concatenate([self._array(position)[None], drawn]), axis=0)
        out: np.ndarray | None = None
        for i, name in enumerate(self.names):
            rows = np.flatnonzero(draws == i)
            if len(rows):
                tokens = read(name, self.streams[name].blocks(position[name], len(rows)))
                out = np.empty((len(draws), tokens.shape[1]), tokens.dtype) if out is None else out
                out[rows] = tokens
        assert out is not None
        return _Window(positions, out.reshape(steps, self.batch_size, -1))

    def _array(self, position: Position) -> np.ndarray:
        return np.array([position[name] for name in self.names])

    def _named(self, position: np.ndarray) -> Position:
        return {name: int(n) for name, n in zip(self.names, position, strict=True)}

    def _draws(self, position: Position, steps: int) -> np.ndarray:
        """Number of the source of each row of `steps` batches: (steps * B,)."""
        if len(self.names) == 1:
            return np.zeros(steps * self.batch_size, np.int64)
        first, rest = divmod(sum(position.values()), self.batch_size)
        assert rest == 0, "a position stands between two batches"
        u = [generator(self.seed, "mixture", first + i).random(self.batch_size) for i in range(steps)]
        return np.searchsorted(self._edges, np.concatenate([np.empty(0), *u]), side="right")
