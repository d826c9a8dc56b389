"""Random draws and digests from labels and content: what a thing *is* decides its number, never when it was asked for.

A generator with a history cannot be resumed, moved or reordered. Here every draw names itself, so that
"the order of epoch 3 of source de under seed 0" is the same number on every machine, in every order of asking.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import xxhash


def seed_for(*labels: str | int) -> int:
    """A 63-bit seed from labels.

    >>> seed_for(0, "order", "de", 3) == seed_for(0, "order", "de", 3)
    True
    >>> seed_for("a", "bc") == seed_for("ab", "c")
    False
    """
    text = "\x1f".join(f"{type(label).__name__}:{label}" for label in labels)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*labels: str | int) -> np.random.Generator:
    """A fresh numpy generator for these labels (Philox: its stream is fixed across numpy versions)."""
    return np.random.Generator(np.random.Philox(seed_for(*labels)))


def digest(*parts: str | bytes) -> str:
    """A short fingerprint (16 hex digits) of texts or bytes, in this order.

    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def checksum(data: Any) -> str:
    """A fast 128-bit checksum (xxh3, as fast as memory is read) of a large contiguous buffer (array or bytes)."""
    return xxhash.xxh3_128_hexdigest(data)


PIECE = 1 << 17
"""Values of a vector that have a checksum: who does anything with them at the time has them in cache already."""


def pieces(length: int) -> Iterator[slice]:
    """Where those of a vector are.

    >>> list(pieces(PIECE + 1))
    [slice(0, 131072, None), slice(131072, 131073, None)]
    """
    return (slice(start, min(start + PIECE, length)) for start in range(0, length, PIECE))


def fingerprint(checksums: Iterable[str]) -> str:
    """Of a vector, from the checksum of each of its `pieces`, in order."""
    return checksum("".join(checksums).encode())


def fingerprint_of(vector: np.ndarray) -> str:
    """The same of a vector (n,) that is at hand."""
    return fingerprint(checksum(vector[here]) for here in pieces(len(vector)))
