"""A row for what a silo's model never saw, so that its export has one for whatever a text may need.

A head that is the embedding cannot leave a row out: what is added takes probability from what was trained. The mean of
all rows would take too much of it where there are few (up to 1 / V_k each). So the mean is moved against u, the
direction along which all states h of the source's own text look alike: h u = 1, as near as least squares come to it. It
goes as far as brings all added rows together to `SHARE` of the probability there, were every state alike. That is where
training pushes a row that never occurs; the logits of all others are as they were.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dept_ray.silo.silo import Silo

SHARE = 1e-4
"""Of the probability in text of the source, for all added rows together: 0.00014 bits a token."""
TOKENS = 8192
"""Of its text, to look at."""
_RIDGE = 1e-4
"""Of the states' mean square: so little that u is short, and so much that it exists. With more, states that are seldom
are no longer met (at toy size a hundred times more let the share rise from 0.001 to 0.02)."""


@dataclass(frozen=True)
class Spare:
    """Rows that nobody trained, all alike."""

    rows: torch.Tensor
    """(added, D) fp32."""
    share: float
    """Of the probability, that they got together in some of the source's text."""


@torch.no_grad()
def spare_rows(silo: Silo, source: str, added: int) -> Spare:
    """So many rows for the model of a trained silo, on the CPU; a source without text makes them the mean."""
    trained, seen, all_others = silo.model.embedding.tokens, list[torch.Tensor](), list[torch.Tensor]()
    row = trained.mean(0).double()
    for ids in _sequences(silo, source):
        seen.append(silo.model.body(silo.model.embedding(ids[None]))[0])
        all_others.append(torch.logsumexp(seen[-1] @ trained.T, 1))
    if not seen or not added:
        return Spare(row.float().expand(added, -1), 0.0)
    states, others = torch.cat(seen).double(), torch.cat(all_others).double()

    def odds() -> torch.Tensor:
        """Of the added rows together against all others, by token."""
        return added * (states @ row - others).exp()

    products = states.T @ states
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    alike = torch.linalg.solve(products, states.sum(0))
    too_much = max(0.0, math.log(float(odds().mean()) / SHARE))
    row = row - too_much * alike / (states @ alike).mean()
    return Spare(row.float().expand(added, -1), float((odds() / (1 + odds())).mean()))


def _sequences(silo: Silo, source: str) -> list[torch.Tensor]:
    """Row numbers of some of a source's text: at most (context,) each."""
    corpus, context = silo.corpora[source], silo.job.inner.context
    shards = next((shards for shards in (corpus.train, corpus.validation) if shards.tokens), None)
    if shards is None:
        return []
    tokens = silo.vocabulary.to_local(np.asarray(shards.map(0)[: max(TOKENS, context)]).astype(np.int64))
    return list(torch.from_numpy(tokens).split(context))
