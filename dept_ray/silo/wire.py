"""A silo's end of the wire: the shared vectors that it holds, and what its last deltas lacked.

Under a lossy codec the body comes as coded steps from one round's to the next, made here on the copy that is held, in
the coordinator's own order of operations: every copy is the same to the bit, and its digest is checked. One who does
not hold what the steps begin at gets the whole vectors. What rounding took from a delta is added to the next delta that
is sent, however many rounds later that is; it belongs to the silo's snapshot, so that a lost attempt leaves no trace.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from dept_ray.codec import Coded, Moves, encode
from dept_ray.errors import SiloError
from dept_ray.messages import RoundOrder

Shared = dict[str, np.ndarray]
"""body: (n,) fp32; rows: (V_k + L, D) fp32; whichever of them the method shares."""


class Wire:
    """Of one silo.

    Args:
        silo: its name, for errors.
        fresh: the shared vectors before the first round, where it can draw them itself; else empty.
    """

    def __init__(self, silo: str, fresh: Shared) -> None:
        self.silo = silo
        self._held, self.holds = fresh, 0 if fresh else -1
        """The shared vectors after round `holds`; -1: none are held."""
        self.residual: dict[str, np.ndarray] = {}
        """By vector, what its last delta lacked; nothing under fp32."""

    def receive(self, order: RoundOrder, take: Callable[[Shared], str]) -> Shared:
        """The shared vectors of an order, whole; only to be read.

        Args:
            order: what was sent.
            take: puts them where they are trained; the fingerprint of the body that it took.

        Raises:
            SiloError: they arrived altered, or begin at a round that is not held.
        """
        sent = {what: vector for what in ("body", "rows") if (vector := getattr(order, what)) is not None}
        holds, self.holds = self.holds, -1  # until they are known to be right
        whole: Shared = {}
        for what, vector in sent.items():
            if isinstance(vector, Moves):
                if vector.base != holds:
                    raise SiloError(f"silo {self.silo}: told to go on from round {vector.base}, it holds {holds}")
                vector.apply(self._held[what])
                whole[what] = self._held[what]
            else:  # an array on Ray is a view of its object store: held, it could never be freed
                whole[what] = vector if order.codec == "fp32" else np.array(vector)
        if take(whole) != order.fingerprint:
            raise SiloError(f"silo {self.silo}: the body of round {order.round} arrived altered")
        if order.codec != "fp32":
            self._held, self.holds = whole, order.round
        return whole

    def send(self, codec: str, deltas: Shared) -> Mapping[str, np.ndarray | Coded]:
        """Deltas as they travel; what they lack is kept."""
        if codec == "fp32":
            return deltas
        sent = {}
        for what, delta in deltas.items():
            wanted = delta + self.residual[what] if what in self.residual else delta
            sent[what], self.residual[what] = encode(wanted, codec)
        return sent

    def parts(self) -> dict[str, torch.Tensor]:
        """Of the silo's snapshot."""
        return {what: torch.from_numpy(vector) for what, vector in self.residual.items()}

    def load(self, parts: Mapping[str, torch.Tensor]) -> None:
        """What `parts` said after the same snapshot; of a fresh silo nothing."""
        self.residual = {what: tensor.numpy() for what, tensor in parts.items()}
