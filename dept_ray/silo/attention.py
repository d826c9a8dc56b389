"""Causal attention: one function, two ways to compute it, chosen in one place by device and length.

It knows nothing of positions, masks of padding or caches: a token sees itself and all before it. The one idea: the
flash kernel of torch is right on a GPU and for long rows, but on a CPU its bf16 path is two to three times slower at
short ones than plain matrix products, so there these are written out, in blocks of rows that stop at the diagonal.
"""

import math

import torch
import torch.nn.functional as F

SHORT = 512
"""Longest T written out on a CPU. At 1024 fp32 gains nothing any more, and what the backward keeps grows with T^2."""
ROWS = 128
"""Rows of a block. Smaller skips more of the upper triangle, larger makes better matrix products; 64 was slower."""


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh) + causal mask) v. q: (B, H, T, Dh), k, v: (B, H or a part of it, T, Dh) -> as q.

    Where there are fewer keys and values, neighbours among the queries share them; they are copied out, which costs
    what as many of their own would (torch's `enable_gqa` has no flash kernel on a CPU). All are of one dtype.
    Forward and backward on one thread of an EPYC, B=8, H=4, Dh=64, T=256: 8.0 ms written out, 15.8 ms SDPA (bf16);
    15.9 and 16.5 ms (fp32). Compiled, 7.2 and 16.4 ms (bf16), 13.9 and 16.3 ms (fp32).
    """
    if k.shape[1] < q.shape[1]:
        k, v = (shared.repeat_interleave(q.shape[1] // k.shape[1], 1) for shared in (k, v))
    if q.device.type != "cpu" or q.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _by_row_blocks(q, k, v)


def _by_row_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Block i of rows against the keys up to its own end. In bf16 only the scores are rounded; softmax sums in fp32."""
    B, H, T, Dh = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (BH, T, Dh)
    # Split once and joined again: the backward of k[:, :end] would fill a zero tensor of full length for every block.
    keys, values = k.split(ROWS, 1), v.split(ROWS, 1)
    out = []
    for i, rows in enumerate(q.split(ROWS, 1)):
        seen = torch.cat(keys[: i + 1], 1)
        mask = torch.full((rows.shape[1], seen.shape[1]), -math.inf, dtype=q.dtype).triu(i * ROWS + 1)
        scores = torch.baddbmm(mask, rows, seen.mT, alpha=Dh**-0.5)
        out.append(torch.softmax(scores, -1) @ torch.cat(values[: i + 1], 1))
    return torch.cat(out, 1).view(B, H, T, Dh)
