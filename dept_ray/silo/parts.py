"""Parts: where moments are too much for one GPU, each rank keeps and steps only its own part of every tensor.

For N parameters and n ranks, a rank holds 4 N bytes of weights, 4 N of gradients and 8 N / n of moments instead of 8 N:
what ZeRO calls stage 1 (Rajbhandari et al., arXiv 1910.02054). One step, of a tensor cut into parts p_0 ... p_(n-1):

    g_r   = sum of all ranks' gradients of p_r, at rank r alone
    |g|^2 = sum over r of |g_r|^2, at all ranks: what is clipped is the norm of the whole
    p_r   = AdamW(p_r, g_r), at rank r alone, by its own moments
    p     = every p_r, copied from rank r

AdamW goes element by element, so that a part is stepped as it would be within the whole. Parts are never in a file:
rank 0 gathers the moments, into the host's memory, when they are to be kept, and spreads them again with an order.

Weights and gradients are not cut, so that nothing travels but what is stepped; where they have no room either, they are
(`sharded`).
"""

from collections.abc import Sequence

import torch
from torch.nn.utils import clip_grads_with_norm_

from dept_ray.silo.optimizer import Group, Optimizer, l2_norm
from dept_ray.silo.team import Team


def part_of(size: int, rank: int, ranks: int) -> slice:
    """A rank's elements of a flat vector; lengths differ by one at most.

    >>> [part_of(8, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """
    return slice(size * rank // ranks, size * (rank + 1) // ranks)


def divide(groups: Sequence[Group], rank: int, parts: int) -> None:
    """Let a rank step its own part of each group; the whole of it where there is one part."""
    for group in groups:
        group.part = part_of(group.tensor.numel(), rank, parts) if parts > 1 else None


def sum_gradients(team: Team, groups: Sequence[Group]) -> None:
    """Make the gradient of what is stepped here the sum over all ranks; what is stepped elsewhere has none any more."""
    for group in groups:
        gradient = group.tensor.grad
        if gradient is None or group.summed:
            continue
        if group.part is None:
            team.sum([gradient])
        else:
            for rank, part in _parts(team, gradient):
                team.sum_to(rank, part)


def clip_gradients(team: Team, groups: Sequence[Group], limit: float) -> None:
    """Scale the gradients of what is stepped down to a norm of `limit` at most: that of all of them, on all ranks."""
    stepped = [group.stepped for group in groups]
    norm = l2_norm(torch.stack([l2_norm(tensor.grad) for tensor in stepped if tensor.grad is not None]))
    if any(group.divided for group in groups):
        squares = norm.square().view(1)
        team.sum([squares])
        norm = squares.sqrt()[0]
    clip_grads_with_norm_(stepped, limit, norm)


def share_parameters(team: Team, groups: Sequence[Group]) -> None:
    """Copy from every other rank the part that it has stepped."""
    for group in groups:
        if group.part is not None:
            for rank, part in _parts(team, group.tensor.detach()):
                team.copy_from(rank, [part])


def spread(team: Team, optimizer: Optimizer, device: str) -> None:
    """Give every rank rank 0's parameters, and its moments of what is stepped there.

    Args:
        team: all ranks.
        optimizer: with whole moments, on any device; those of the other ranks say shapes alone (device meta).
        device: where moments are to be.
    """
    team.copy_from(0, optimizer.tensors)
    for group in optimizer.groups:
        moments = optimizer.moments.get(group.name, {})
        for key, whole in moments.items():
            if group.part is None or whole.dim() == 0:
                moments[key] = there(whole, device)
                team.copy_from(0, [moments[key]])
                continue
            for rank, part in _parts(team, whole):
                copy = there(part, device, copy=True)  # never a view, which would keep the whole
                team.copy_from(0, [copy])
                if rank == team.rank:
                    moments[key] = copy


def gather_moments(team: Team, optimizer: Optimizer) -> None:
    """Let rank 0 have whole moments again, in the host's memory: a GPU may have no room for them."""
    for group in optimizer.groups:
        moments = optimizer.moments.get(group.name, {})
        for key, mine in moments.items():
            if group.part is None or mine.dim() == 0:
                continue
            whole = torch.empty(group.tensor.shape, device="cpu" if team.rank == 0 else "meta")
            for rank, part in _parts(team, whole):
                copy = mine if rank == team.rank else torch.empty(part.shape, device=mine.device)
                team.copy_from(rank, [copy])
                part.copy_(copy)
            if team.rank == 0:
                moments[key] = whole


def _parts(team: Team, tensor: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Each rank with its part of a tensor, a view (n,)."""
    flat = tensor.view(-1)
    return [(rank, flat[part_of(len(flat), rank, team.size)]) for rank in range(team.size)]


def there(tensor: torch.Tensor, device: str, copy: bool = False) -> torch.Tensor:
    """A tensor on a device; one without values gets whatever is there."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device, copy=copy)
