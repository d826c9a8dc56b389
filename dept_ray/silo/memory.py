"""What a training process does with memory: it keeps what it has freed, and seldom looks for garbage."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Of glibc's `mallopt`."""


def keep_freed_memory(one_arena: bool = True) -> None:
    """Keep big blocks for the next ones of their size, instead of giving them back and faulting them in anew.

    On a CPU a training step is 1.6 times as fast, and the first touch of fresh memory costs a coordinator more than
    the arithmetic on it. To be called before threads are started that allocate. It changes speed, never results, and
    does nothing where the C library is not glibc.

    Args:
        one_arena: for all threads, since only the main one's keeps blocks of over 64 MiB. Not where text is tokenised:
            threads that allocate small things by the million wait for one lock, and take three to five times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for what, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 1 << 26)):
            mallopt(what, value)
        if one_arena:
            mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """What is kept for next ones that will not come: a thread may take its blocks from elsewhere than the one before.

    Where the C library is not glibc it does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def loading() -> Iterator[None]:
    """While a process of our own loads what it will need until its end, which is no garbage, now or later.

    Python looks for garbage as objects become more: a third of the time that torch's compiler takes to be imported.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
