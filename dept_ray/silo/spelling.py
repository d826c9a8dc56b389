"""How the tokens of a vocabulary are spelt, as plain values that can be kept: its pieces, and what cuts others' pieces.
With that come the two sides of a warm start (`silo.warmstart`): tables that give rows, a vocabulary that wants them.

A token is cut by the *model* of a tokenizer, in the alphabet in which it stands, so that also a token of half a
character has parts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dept_ray.draws import seed_for
from dept_ray.silo.usage import usage_of
from dept_ray.silo.warmstart import Table, Wanted
from dept_ray.text.shards import Corpus
from dept_ray.text.tokenizer import Vocabulary, pieces_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Spelling = dict[str, Any]
"""pieces: the token of each row. tokenizer: as JSON."""


def spelling(tokenizer: "Tokenizer", vocabulary: Vocabulary) -> Spelling:
    """Of the rows of a vocabulary."""
    pieces = pieces_of(tokenizer, vocabulary.global_size)
    return {
        "pieces": [pieces[id] for id in vocabulary.to_global(np.arange(vocabulary.size))],
        "tokenizer": tokenizer.to_str(),
    }


def wanted_by(corpora: Sequence[Corpus], vocabulary: Vocabulary, seed: int) -> Wanted:
    """Rows for a vocabulary, of corpora under one tokenizer whose text has all its ids in it."""

    def usage() -> torch.Tensor:
        texts = (corpus.train.map(shard) for corpus in corpora for shard in range(len(corpus.train.files)))
        generator = torch.Generator().manual_seed(seed_for(seed, "usage"))
        return usage_of(map(vocabulary.to_local, texts), vocabulary.size, generator)

    pieces = pieces_of(corpora[0].tokenizer, vocabulary.global_size)
    return Wanted(tuple(pieces[id] for id in vocabulary.to_global(np.arange(vocabulary.size))), usage)


def table_of(spelt: Spelling, rows: torch.Tensor) -> Table:
    """Rows (V_k, D) with their tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(spelt["tokenizer"])

    def cut(piece: str) -> list[str]:
        try:
            return [token.value for token in tokenizer.model.tokenize(piece)]
        except Exception as err:  # for a character that a model has not the library raises a bare one
            if type(err) is not Exception:
                raise
            return []

    return Table(tuple(spelt["pieces"]), rows, cut)
