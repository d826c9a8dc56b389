"""AdamW over named groups of one tensor each, by torch's fused kernel.

`torch.optim.Optimizer` imports the compiler, 2 s of CPU in every silo's process before its first step, and does nothing
here that these lines do not.
"""

from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass
class Group:
    """One tensor with a gradient, and how it is stepped."""

    name: str
    tensor: torch.Tensor
    weight_decay: float
    lr: float = 0.0


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
        """By group: step (scalar), exp_avg and exp_avg_sq (of the tensor's shape); a group begins without."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is stepped."""
        return [group.tensor for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of every group at its learning rate."""
        for group in self.groups:
            tensor, grad = group.tensor, group.tensor.grad
            assert grad is not None
            moments = self.moments.get(group.name)
            if moments is None:
                moments = self.moments[group.name] = {
                    "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                    "exp_avg": torch.zeros_like(tensor),
                    "exp_avg_sq": torch.zeros_like(tensor),
                }
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
