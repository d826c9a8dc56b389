"""AdamW over named groups of one tensor each, by torch's fused kernel; and Muon on the body's matrices, by torch's own.

`torch.optim.Optimizer` imports the compiler, 2 s of CPU in every silo's process before its first step, and does nothing
for AdamW that these lines do not. Who asks for Muon pays it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.optim.adamw import adamw

_ROW = 4096
"""Squares that are summed at once."""


@dataclass
class Group:
    """One tensor with a gradient, and how it is stepped."""

    name: str
    tensor: torch.Tensor
    weight_decay: float
    lr: float = 0.0
    part: slice | None = None
    """The elements that are stepped here, where other ranks step the others (`parts`); None: all."""
    summed: bool = False
    """Whether the backward pass has summed its gradient over the ranks (`sharded`)."""

    @property
    def kind(self) -> str:
        """matrices, vectors, tokens or positions."""
        return self.name

    @property
    def divided(self) -> bool:
        """Whether other ranks step the rest of it."""
        return self.part is not None

    @property
    def stepped(self) -> torch.Tensor:
        """What is stepped here, with its gradient: the tensor, or a view (n,) of its part."""
        if self.part is None:
            return self.tensor
        part = self.tensor.detach().view(-1)[self.part]
        if self.tensor.grad is not None:
            part.grad = self.tensor.grad.view(-1)[self.part]
        return part

    def norm(self) -> torch.Tensor:
        """L2, of the whole: 0-dim fp32."""
        return l2_norm(self.tensor.detach())


def l2_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Of all its values, 0-dim fp32: by rows, for on a CPU one sum of many squares in fp32 is too small.

    Of 80 million normal values it would be 0.8 % too small, and a gradient that much too large after it was clipped.
    """
    flat = tensor.reshape(-1)
    even = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:even].view(-1, _ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[even:], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.cat((rows, rest.view(1))))


class Optimizer(Protocol):
    """What a silo trains with."""

    groups: list[Group]
    moments: dict[str, dict[str, torch.Tensor]]
    """By group; one that has not been stepped has none. Of a part they have its elements alone."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Of all groups, whole."""
        ...

    def step(self) -> None:
        """One update of every group at its learning rate."""
        ...

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: views of them live elsewhere."""
        ...

    def forget(self) -> None:
        """Begin without moments again."""
        ...


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); moments in the tensors' own type.

    Args:
        groups: names are unique; every tensor has a gradient when `step` is called.
        betas: of the first and the second moment.
        eps: added to the root of the second.
    """

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float) -> None:
        self.groups, self.betas, self.eps = groups, betas, eps
        self.moments: dict[str, dict[str, torch.Tensor]] = {}
        """By group: step (scalar), exp_avg and exp_avg_sq (of the shape of what is stepped); it begins without."""
        self._forgotten: dict[str, dict[str, torch.Tensor]] = {}
        """Moments whose memory serves again: to give back two bodies of it each round, and to touch as much anew, costs
        a silo more than a step's arithmetic on them."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Of all groups, whole."""
        return [group.tensor for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of every group at its learning rate."""
        for group in self.groups:
            tensor = group.stepped
            grad = tensor.grad
            assert grad is not None
            moments = self.moments.get(group.name)
            if moments is None:
                step = torch.zeros((), dtype=torch.float32, device=tensor.device)
                like = {"step": step, "exp_avg": tensor, "exp_avg_sq": tensor}
                moments = self.moments[group.name] = {key: self.zeros(group.name, key, of) for key, of in like.items()}
            adamw(
                [tensor], [grad], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [moments["step"]], fused=True,
                amsgrad=False, maximize=False, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, lr=group.lr,
                weight_decay=group.weight_decay,
            )  # fmt: skip

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: views of them live elsewhere."""
        for tensor in self.tensors:
            if tensor.grad is not None:
                tensor.grad.zero_()

    def forget(self) -> None:
        """Begin without moments again."""
        self._forgotten.update(self.moments)
        self.moments.clear()

    def zeros(self, group: str, key: str, like: torch.Tensor) -> torch.Tensor:
        """A moment to begin with."""
        was = self._forgotten.get(group, {}).pop(key, None)
        kind = (like.shape, like.dtype, like.device)
        same = was is not None and (was.shape, was.dtype, was.device) == kind
        return was.zero_() if was is not None and same else torch.zeros_like(like)


class Muon:
    """Orthogonalised momentum for matrices (Jordan et al. 2024, as `torch.optim.Muon`), AdamW for all else.

    Updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate
    serves both. Momentum 0.95, Nesterov, five Newton-Schulz steps in bf16; the momentum is flat, as the matrices are.

    Args:
        matrices: one flat tensor, with its gradient.
        shapes: of the matrices in it, in order.
        others: steps everything else.
    """

    def __init__(self, matrices: Group, shapes: Sequence[tuple[int, ...]], others: AdamW) -> None:
        self.matrices, self.shapes, self.others = matrices, shapes, others
        self.groups, self.moments = [matrices, *others.groups], others.moments
        self._muon = torch.optim.Muon(self._views(matrices.tensor), adjust_lr_fn="match_rms_adamw")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Of all groups, whole."""
        return [group.tensor for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of every group at its learning rate."""
        self.others.step()
        flat, grad = self.matrices.tensor, self.matrices.tensor.grad
        assert grad is not None
        kept = self.moments.setdefault("matrices", {})
        if not kept:
            kept["momentum"] = self.others.zeros("matrices", "momentum", flat)
        (settings,) = self._muon.param_groups
        settings.update(lr=self.matrices.lr, weight_decay=self.matrices.weight_decay)
        for matrix, gradient, momentum in zip(
            settings["params"], self._views(grad), self._views(kept["momentum"]), strict=True
        ):
            matrix.grad, self._muon.state[matrix]["momentum_buffer"] = gradient, momentum
        self._muon.step()

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.others.zero_grad()
        if self.matrices.tensor.grad is not None:
            self.matrices.tensor.grad.zero_()

    def forget(self) -> None:
        """Begin without moments again."""
        self.others.forget()

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
