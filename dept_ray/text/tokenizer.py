"""Tokenizers and vocabularies: train or load one, trim it to what a source uses, translate ids, and model unigrams.

The library `tokenizers` does the work; this file says which settings, and what a vocabulary *is* here: a global size
and, where it was trimmed, the sorted global ids that a source owns. All tokenizers that we train are byte-level, so every
text has an encoding and every encoding gives the text back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dept_ray.config import TokenizerSection
from dept_ray.errors import VocabularyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


def train_tokenizer(texts: Iterable[str], section: TokenizerSection, what: str) -> "Tokenizer":
    """A byte-level BPE or unigram tokenizer of exactly `section.vocab_size` ids; id 0 ends a text.

    Args:
        texts: documents.
        section: `kind` is bpe or unigram.
        what: whose text this is, for the error.

    Raises:
        VocabularyError: the text does not hold that many different tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shared = dict(vocab_size=section.vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    if section.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(**shared)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(**shared)
    # use_regex: words and numbers are cut apart first, as in GPT-2; no prefix space, so that decoding is exact.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = tokenizer.get_vocab_size()
    if reached < section.vocab_size:
        raise VocabularyError(
            f"tokenizer.vocab_size = {section.vocab_size}, but the text of {what} only yields {reached} tokens: "
            f"set tokenizer.vocab_size to {reached} or less, or give it more text"
        )
    return tokenizer


def load_tokenizer(section: TokenizerSection) -> "Tokenizer":
    """An existing tokenizer: kind = file (a tokenizer.json) or hub (by name).

    Raises:
        VocabularyError: it cannot be read, or has no token that ends a text.
    """
    from tokenizers import Tokenizer

    try:
        if section.kind == "file":
            tokenizer = Tokenizer.from_file(str(section.name))
        else:
            tokenizer = Tokenizer.from_pretrained(str(section.name))
    except Exception as err:  # noqa: BLE001 - the library raises bare Exception for every failure
        raise VocabularyError(f"tokenizer.name = {section.name!r}: cannot be loaded ({err}); check the path or name") from None
    end_of_text(tokenizer)
    return tokenizer


def end_of_text(tokenizer: "Tokenizer") -> int:
    """The id that ends (and here also begins) a text.

    Raises:
        VocabularyError: the tokenizer has none of the usual ones.
    """
    for token in _KNOWN_ENDS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise VocabularyError(
        f"the tokenizer has no token that ends a text (looked for {', '.join(_KNOWN_ENDS)}): "
        f"add {END_OF_TEXT} to its special tokens"
    )


@dataclass(frozen=True)
class Vocabulary:
    """The rows of one silo: all of a vocabulary, or the ids that its text uses.

    >>> v = Vocabulary.trimmed(10, np.array([0, 3, 7]))
    >>> v.size, v.to_local(np.array([7, 0])).tolist(), v.to_global(np.array([2, 0])).tolist()
    (3, [2, 0], [7, 0])
    """

    global_size: int
    ids: np.ndarray | None = None
    """Sorted global ids (int64) that are owned; None: all of them."""

    @classmethod
    def trimmed(cls, global_size: int, used: np.ndarray) -> "Vocabulary":
        """Keeps the ids in `used` (sorted, unique)."""
        return cls(global_size, np.unique(used).astype(np.int64))

    @property
    def size(self) -> int:
        """|V_k|."""
        return self.global_size if self.ids is None else len(self.ids)

    def to_local(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers of global ids, any shape.

        Raises:
            VocabularyError: an id is not owned.
        """
        if self.ids is None:
            if ids.size and int(ids.max()) >= self.global_size:
                raise VocabularyError(f"token id {int(ids.max())} is outside the vocabulary of {self.global_size} ids")
            return ids
        table = self.__dict__.get("_table")
        if table is None:  # built once: global id -> row, -1 where not owned
            table = np.full(self.global_size, -1, dtype=np.int32)
            table[self.ids] = np.arange(len(self.ids), dtype=np.int32)
            object.__setattr__(self, "_table", table)
        if ids.size and int(ids.max()) >= self.global_size:
            raise VocabularyError(f"token id {int(ids.max())} is outside the vocabulary of {self.global_size} ids")
        local = table[ids]
        if ids.size and local.min() < 0:
            missing = np.unique(ids[local < 0])
            raise VocabularyError(
                f"token id {int(missing[0])} is not among the {self.size} ids of this trimmed vocabulary "
                f"({len(missing)} such ids): the text holds what the source never did"
            )
        return local

    def to_global(self, rows: np.ndarray) -> np.ndarray:
        """Global ids of row numbers, any shape."""
        return rows if self.ids is None else self.ids[rows]


def unigram_nats(counts: np.ndarray) -> np.ndarray:
    """-log p of each id under the add-one smoothed unigram model: (V,) counts -> (V,) fp64 nats.

    >>> np.exp(-unigram_nats(np.array([1, 0, 5]))).round(3).tolist()
    [0.222, 0.111, 0.667]
    """
    smoothed = counts.astype(np.float64) + 1.0
    return np.log(smoothed.sum()) - np.log(smoothed)
