"""`Vectors`: what a silo trains as arrays, into the model and out of it: its `body` and its `rows`.

Which of them are shared, and which stay home, is for others to know. Moments are none of them.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dept_ray.draws import checksum, fingerprint, pieces
from dept_ray.errors import SiloError
from dept_ray.silo.model import LanguageModel
from dept_ray.silo.wire import Shared


class Vectors:
    """Of one silo.

    Args:
        silo: its name, for errors.
        model: whose embedding the rows are.
        body: the model's flat body (n,), on its device.
    """

    def __init__(self, silo: str, model: LanguageModel, body: torch.Tensor) -> None:
        self.silo, self.model, self.body = silo, model, body

    def read(self, what: str) -> np.ndarray:
        """The body, (n,), or the rows, (V_k + L, D): tokens, then positions. Only to be read, and at once."""
        if what == "body":
            return self.body.cpu().numpy()
        tables = [self.model.embedding.tokens, self.model.embedding.positions]
        return torch.cat([t.detach() for t in tables if t is not None]).cpu().numpy()

    def copies(self, names: Iterable[str]) -> Shared:
        """Some of them as they stand."""
        return {what: np.array(self.read(what)) for what in names}

    def take(self, given: Shared) -> str:
        """Copy what is given into the model.

        Returns:
            The fingerprint of the body, looked at while it is in cache; empty where none was given.

        Raises:
            SiloError: it is another model's.
        """
        seen = ""
        if "body" in given:
            if given["body"].shape != tuple(self.body.shape):
                mine, other = len(self.body), given["body"].shape
                raise SiloError(f"silo {self.silo}: ordered a body of {other}, mine has {mine} values")
            seen = fingerprint(_copied(self.body, given["body"]))
        if "rows" in given:
            embedding = self.model.embedding
            size = len(embedding.tokens)
            _copy(embedding.tokens, given["rows"][:size])
            if embedding.positions is not None:
                _copy(embedding.positions, given["rows"][size:])
        return seen


def _copied(target: torch.Tensor, source: np.ndarray) -> Iterator[str]:
    """Copy a flat vector; the checksum of each piece."""
    for here in pieces(len(source)):
        _copy(target[here], source[here])
        yield checksum(source[here])


def _copy(target: torch.Tensor, source: np.ndarray) -> None:
    """Copy an array that is only read (Ray's are read-only views, of which torch warns) into a parameter."""
    if target.device.type == "cpu":
        target.detach().numpy()[...] = source
    else:
        target.detach().copy_(torch.tensor(source))
