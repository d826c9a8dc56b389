"""Rows for a vocabulary that nobody has trained: those of the tokens that other vocabularies have too, else drawn.

Tables of several silos under SPEC live in spaces of their own, so each is first turned onto the first one, by the
rotation that brings the tokens which both have closest together (orthogonal Procrustes; METHOD.md section 6). What is
in no table is drawn with the mean and spread, per dimension, of what is. No text is read, and no model is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Table:
    """Rows and the tokens that they are of."""

    pieces: tuple[str, ...]
    """As the tokenizer writes them; those of byte-level tokenizers compare."""
    rows: torch.Tensor
    """(V_k, D) fp32."""

    @property
    def places(self) -> Mapping[str, int]:
        """Row by token."""
        return {piece: row for row, piece in enumerate(self.pieces)}


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
    return Table(table.pieces, table.rows @ rotation(table.rows[mine], onto.rows[theirs]))


def overlapping_rows(pieces: Sequence[str], tables: Sequence[Table], generator: torch.Generator) -> torch.Tensor:
    """Rows (V, D) for `pieces`: the mean of those that the tables have, all in the first one's space; else drawn.

    Args:
        pieces: of the new vocabulary.
        tables: one at least.
        generator: of the draws.
    """
    first = tables[0]
    laid = [first, *(laid_onto(table, first) for table in tables[1:])]
    known = torch.cat([table.rows for table in laid])
    std, mean = torch.std_mean(known, dim=0)
    drawn = mean + std * torch.randn(len(pieces), known.shape[1], generator=generator)
    places = [table.places for table in laid]
    for row, piece in enumerate(pieces):
        found = [table.rows[at[piece]] for table, at in zip(laid, places, strict=True) if piece in at]
        if found:
            drawn[row] = found[0] if len(found) == 1 else torch.stack(found).mean(0)
    return drawn
