"""Rows for a vocabulary that nobody has trained: those of the tokens that other vocabularies have too, and for the rest
a way of a table (METHOD.md section 6).

Tables of several silos under SPEC live in spaces of their own, so each is first turned onto the first one, by the
rotation that brings the tokens which both have closest together (orthogonal Procrustes). Every way begins with the
overlap, and whatever it cannot say is drawn with the mean and spread, per dimension, of what is known. No model is
asked, and the only text that a way may look at is that of the new vocabulary itself (`silo.usage`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

NEIGHBOURS = 10
TEMPERATURE = 0.1
"""OFA's (Liu et al., arXiv 2311.08849)."""


@dataclass(frozen=True)
class Table:
    """Rows and the tokens that they are of."""

    pieces: tuple[str, ...]
    """As the tokenizer writes them; those of byte-level tokenizers compare."""
    rows: torch.Tensor
    """(V_k, D) fp32."""
    cut: Callable[[str], Sequence[str]] = list
    """How its tokenizer spells a token of another, in its own tokens."""

    @property
    def places(self) -> Mapping[str, int]:
        """Row by token."""
        return {piece: row for row, piece in enumerate(self.pieces)}


@dataclass(frozen=True)
class Wanted:
    """The vocabulary that rows are for."""

    pieces: tuple[str, ...]
    usage: Callable[[], torch.Tensor]
    """(V, C): what stands beside each token in its own text, 0 where it is never used; asked for by `ofa` alone."""


def rotation(rows: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """The orthogonal (D, D) matrix R that makes |rows R - onto| least: rows and onto are (n, D), of the same tokens."""
    u, _, v = torch.linalg.svd(rows.double().T @ onto.double())
    return (u @ v).to(rows.dtype)


def laid_onto(table: Table, onto: Table) -> Table:
    """A table in another's space; as it is where they have fewer tokens in common than dimensions."""
    here, there = table.places, onto.places
    common = sorted(here.keys() & there.keys())
    if len(common) < table.rows.shape[1]:
        return table
    mine, theirs = ([places[piece] for piece in common] for places in (here, there))
    return Table(table.pieces, table.rows @ rotation(table.rows[mine], onto.rows[theirs]), table.cut)


def warm_rows(way: str, wanted: Wanted, tables: Sequence[Table], generator: torch.Generator) -> torch.Tensor:
    """Rows (V, D): of a token that tables have, the mean of theirs, all in the first one's space; of others, the way's.

    Args:
        way: a key of `WAYS`.
        wanted: the new vocabulary.
        tables: one at least.
        generator: of the draws.
    """
    first = tables[0]
    laid = [first, *(laid_onto(table, first) for table in tables[1:])]
    known = torch.cat([table.rows for table in laid])
    std, mean = torch.std_mean(known, dim=0)
    rows = mean + std * torch.randn(len(wanted.pieces), known.shape[1], generator=generator)
    places = [table.places for table in laid]
    new = torch.ones(len(rows), dtype=torch.bool)
    for row, piece in enumerate(wanted.pieces):
        found = [table.rows[at[piece]] for table, at in zip(laid, places, strict=True) if piece in at]
        if found:
            rows[row] = found[0] if len(found) == 1 else torch.stack(found).mean(0)
            new[row] = False
    WAYS[way](wanted, laid, rows, new)
    return rows


def _as_drawn(wanted: Wanted, tables: Sequence[Table], rows: torch.Tensor, new: torch.Tensor) -> None:
    """What is in no table stays as it was drawn."""


def _like_neighbours(wanted: Wanted, tables: Sequence[Table], rows: torch.Tensor, new: torch.Tensor) -> None:
    """As OFA: the mean of the tokens that are used most alike, weighted by a softmax of their cosines.

    OFA takes its likeness from word vectors that were trained elsewhere; here it is that of the new text itself, in
    which the tokens that tables have too occur as well.
    """
    usage = wanted.usage()
    used = usage.norm(dim=1) > 0
    usage = F.normalize(usage, dim=1)
    known, unknown = (torch.nonzero(used & which).flatten() for which in (~new, new))
    if not len(known):
        return
    for some in unknown.split(1024):
        nearest = (usage[some] @ usage[known].T).topk(min(NEIGHBOURS, len(known)))
        weights = torch.softmax(nearest.values / TEMPERATURE, 1)
        rows[some] = torch.einsum("nk,nkd->nd", weights, rows[known[nearest.indices]])


def _of_parts(wanted: Wanted, tables: Sequence[Table], rows: torch.Tensor, new: torch.Tensor) -> None:
    """As TokenAdapt's local part (arXiv 2505.09738): a token cut by a table's own tokenizer, the mean of its parts.

    Weighted by length. TokenAdapt also weighs by likeness to the whole, in a text embedding that was trained elsewhere.
    """
    places = [table.places for table in tables]
    for row in torch.nonzero(new).flatten().tolist():
        found = []
        for table, at in zip(tables, places, strict=True):
            parts = [part for part in table.cut(wanted.pieces[row]) if part in at]
            if parts:
                lengths = torch.tensor([float(len(part)) for part in parts])
                found.append(lengths / lengths.sum() @ table.rows[[at[part] for part in parts]])
        if found:
            rows[row] = torch.stack(found).mean(0)


WAYS: dict[str, Callable[[Wanted, Sequence[Table], torch.Tensor, torch.Tensor], None]] = {
    "overlap": _as_drawn,
    "ofa": _like_neighbours,
    "tokenadapt": _of_parts,
}
"""By name: fills the rows (V, D) that are `new` (V,), in place."""
