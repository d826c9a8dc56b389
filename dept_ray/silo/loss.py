"""The cross-entropy of a tied head, summed in nats, without ever holding the logits of a whole batch.

It does not average: sums are divided once, where they are read. The one idea: the gradient of a sum of cross-entropies
is known as soon as a chunk's logits are, so each chunk leaves its share of both gradients behind in the forward pass
and its logits are forgotten. Nothing is computed twice, and memory is one chunk instead of three times (N, V).

torch's own `F.linear_cross_entropy` does the same, but on bf16 it returns the *sum* in bf16 (three digits) and
multiplies in fp32. At N=4096, V=50257, D=256 on one thread of an EPYC, seconds and MiB at the peak:

                            fp32           bf16 autocast
    logits at once          3.4   2330     2.5   2380
    checkpoint per chunk    5.1    390     3.5    480
    torch, chunked          5.2    140     5.4    150
    here, 512 rows          3.0    320     2.2    370

With malloc told to keep its memory (silo/hardware.py) logits at once are a tenth faster than here, for five times the
memory; at V=8192 and compiled they are never faster. So there is one way only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100
"""A target that is not scored; torch's own convention."""

CHUNK_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of logits held at once. CPU: measured; below 256 the (V, D) gradient is added up too often, above 1024 the
chunk leaves the cache. A GPU wants products large enough to fill it."""
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Upper bound of a chunk in fp32, which makes rows fewer from V = 131,072 (CPU) or 65,536 (CUDA) on."""


def loss_of_chunk(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, x_wanted: bool, weight_grad: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of some rows of x (n, D) and targets (n,): the summed loss, 0-dim fp32, and its gradient (n, D), where wanted.

    That of the head (V, D), where wanted, is added to `weight_grad`.
    """
    scored = (targets != IGNORED)[:, None]
    at = targets[:, None].where(scored, 0)
    logits = F.linear(x, head).float()  # (n, V)
    log_sum = logits.logsumexp(1, keepdim=True)
    loss = (log_sum - logits.gather(1, at)).where(scored, 0).sum()
    if not x_wanted and weight_grad is None:
        return loss, None
    # In place: probabilities, minus one at the target, zero where nothing is scored.
    grad = logits.sub_(log_sum).exp_()
    grad = grad.scatter_add_(1, at, torch.full_like(log_sum, -1)).mul_(scored).to(x.dtype)
    if weight_grad is not None:
        weight_grad += grad.mT @ x
    return loss, grad @ head if x_wanted else None


Chunk = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]
"""`loss_of_chunk`, or what computes the same."""


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: int | None = None,
    chunk: Chunk = loss_of_chunk,
) -> torch.Tensor:
    """Sum of -log softmax(x weight^T)[target] in nats over the targets that are not `IGNORED`.

    x: (N, D), weight: (V, D), targets: (N,) int64 -> 0-dim fp32. Products are computed in autocast's dtype where it is
    on, all else in fp32; gradients have the dtypes of x and weight. `rows` overrides how many rows make a chunk,
    `chunk` what computes one: `loss_of_chunk`, or its compiled twin.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if rows is None:
        rows = chunk_rows(weight.shape[0], device)
    training = torch.is_grad_enabled()
    wanted = (training and x.requires_grad, training and weight.requires_grad)
    total: Any = _LinearCrossEntropy.apply(x, weight, targets, rows, dtype, wanted, chunk)
    return total


def chunk_rows(V: int, device: str) -> int:
    """Rows of logits that are held at once."""
    kind = "cpu" if device == "cpu" else "cuda"
    return max(1, min(CHUNK_ROWS[kind], CHUNK_BYTES[kind] // (4 * V)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: loss and both gradients, chunk by chunk. Backward: scale them. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        dtype: torch.dtype,
        wanted: tuple[bool, bool],
        chunk: Chunk,
    ) -> torch.Tensor:
        x, head = x.detach(), weight.detach().to(dtype)  # a compiler asks the undetached for gradients
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        x_grads: list[torch.Tensor] = []
        weight_grad = torch.zeros_like(weight) if wanted[1] else None
        for x_rows, target_rows in zip(x.to(dtype).split(rows), targets.split(rows), strict=True):
            loss, x_grad = chunk(x_rows, head, target_rows, wanted[0], weight_grad)
            total += loss
            if x_grad is not None:
                x_grads.append(x_grad.to(x.dtype))
        ctx.save_for_backward(torch.cat(x_grads) if wanted[0] else None, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        return *(None if saved is None else saved * scale for saved in ctx.saved_tensors), None, None, None, None, None
