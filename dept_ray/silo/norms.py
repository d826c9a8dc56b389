"""How large parameters and activations are while a silo trains: their L2 norms (METHOD.md section 4).

A norm that grows without end comes before a loss that diverges. Measuring changes no number of the run: it is a forward
pass of its own, without gradients and outside of what is compiled. It waits for no device: what is measured stays there
and is read once, when the round is over.
"""

from collections.abc import Mapping, Sequence

import torch

from dept_ray.silo.model import LanguageModel
from dept_ray.silo.optimizer import Group

BODY = ("matrices", "vectors")
"""Kinds of the optimizer's groups that the body is made of; the others are the embedding."""


class Norms:
    """What was measured in one round.

    Args:
        every: steps between two measurements, by the global step, so that rounds of any length join; 0: never.
        first_step: global step at which the round begins.
    """

    def __init__(self, every: int, first_step: int) -> None:
        self.every, self.first_step = every, first_step
        self._steps: list[int] = []
        self._found: list[torch.Tensor] = []

    def due(self, done: int) -> bool:
        """Whether to measure after `done` steps of the round."""
        return self.every > 0 and (self.first_step + done) % self.every == 0

    def measure(self, done: int, model: LanguageModel, groups: Sequence[Group], ids: torch.Tensor) -> None:
        """Measure parameters as they are, and activations on some text.

        Args:
            done: steps of the round behind them.
            model: that trains.
            groups: of its optimizer, which name its parameters.
            ids: (B, T) a micro-batch.
        """
        self._steps.append(self.first_step + done)
        self._found.append(torch.stack([*parameter_norms(groups), block_norms(model, ids).max()]))

    def read(self, before: Mapping[str, list[float]] | None = None) -> dict[str, list[float]]:
        """`step`, and at each of them `body`, `embedding` and `activation`; nothing, where nothing was measured.

        Args:
            before: what was read of an earlier piece of the round.
        """
        if not self._steps:
            return dict(before or {})
        body, embedding, activation = torch.stack(self._found).T.tolist()
        steps = [float(step) for step in self._steps]
        found = {"step": steps, "body": body, "embedding": embedding, "activation": activation}
        return {what: [*(before or {}).get(what, []), *values] for what, values in found.items()}


@torch.no_grad()
def parameter_norms(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norms of all parameters of the body, and of all of the embedding with its positions: 0-dim fp32 each."""
    norms = [(group.kind in BODY, group.norm()) for group in groups]
    parts = [torch.stack([norm for in_body, norm in norms if in_body == body]) for body in (True, False)]
    return torch.linalg.vector_norm(parts[0]), torch.linalg.vector_norm(parts[1])


@torch.no_grad()
def block_norms(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """The residual stream after each block, its L2 norm as a mean over tokens: (layers,) fp32.

    Args:
        model: whose blocks they are.
        ids: (B, T).
    """
    found: list[torch.Tensor] = []

    def keep(block: torch.nn.Module, given: object, x: torch.Tensor) -> None:
        found.append(torch.linalg.vector_norm(x.float(), dim=-1).mean())

    hooks = [block.register_forward_hook(keep) for block in model.body.blocks]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
