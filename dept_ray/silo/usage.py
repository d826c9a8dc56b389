"""How a text uses its tokens: what stands beside each, as vectors in which tokens that are used alike are alike.

Random indexing (Sahlgren 2005): every token has a direction that was drawn once, and a token's vector is the sum of its
neighbours' directions, turned by one place for those before it. So co-occurrence is counted without a matrix of V x V.
Frequent neighbours say little and weigh little, and what the text's average token has is taken away.
"""

from collections.abc import Iterable

import numpy as np
import torch

WIDTH = 256
WINDOW = 3
"""Tokens looked at on either side, the second half and the third a third as much as the first."""
MOST_TOKENS = 1_000_000
"""Of a text; its first ones."""
_AT_ONCE = 65_536
_RARE = 1e-3
"""Share of the text from which on a neighbour weighs less (as word2vec draws it less often)."""


def usage_of(texts: Iterable[np.ndarray], size: int, generator: torch.Generator) -> torch.Tensor:
    """(V, WIDTH) fp32: a vector for each token, 0 for one that does not occur.

    Args:
        texts: tokens of one stream each, (n,) of ids below `size`.
        size: V.
        generator: of the directions.
    """
    streams, room = list[torch.Tensor](), MOST_TOKENS
    for text in texts:
        streams.append(torch.from_numpy(np.asarray(text[:room]).astype(np.int64)))
        room -= len(streams[-1])
    counts = sum((torch.bincount(stream, minlength=size) for stream in streams), torch.zeros(size)).float()
    weights = (_RARE * counts.sum() / counts.clamp(min=1)).sqrt().clamp(max=1)
    directions = torch.randn(size, WIDTH, generator=generator) * weights[:, None]
    turned = directions.roll(1, 1)
    vectors = torch.zeros(size, WIDTH)
    for stream in streams:
        for start in range(0, len(stream), _AT_ONCE):
            some = stream[start : start + _AT_ONCE]
            for apart in range(1, min(WINDOW, len(some) - 1) + 1):
                before, after = some[:-apart], some[apart:]
                vectors.index_add_(0, before, directions[after], alpha=1 / apart)
                vectors.index_add_(0, after, turned[before], alpha=1 / apart)
    vectors /= counts.clamp(min=1)[:, None]
    average = (vectors * counts[:, None]).sum(0) / counts.sum().clamp(min=1)
    return torch.where(counts[:, None] > 0, vectors - average, 0.0)
