"""Tokenizers and vocabularies: train or load one, trim it to what a source uses, translate ids, and model unigrams.

The library `tokenizers` does the work; this file says which settings, and what a vocabulary *is* here: a global size
and, where it was trimmed, the sorted global ids that a source owns. All tokenizers that we train are byte-level, so
every text has an encoding and every encoding gives the text back; the same text gives the same tokenizer.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dept_ray.draws import digest
from dept_ray.errors import VocabularyError
from dept_ray.sections import TokenizerSection

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_SMALLEST = 258
"""All 256 bytes, the end of a text and one merge: the least that a job may ask for."""


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
    if section.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        make_trainer = trainers.BpeTrainer
    else:
        tokenizer = Tokenizer(models.Unigram())
        make_trainer = trainers.UnigramTrainer
    trainer = make_trainer(
        vocab_size=section.vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    # use_regex: words and numbers are cut apart first, as in GPT-2; no prefix space, so that decoding is exact.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = vocabulary_size(tokenizer)
    if reached < section.vocab_size:
        remedy = f"set tokenizer.vocab_size to {reached} or less, or give it" if reached >= _SMALLEST else "give it"
        raise VocabularyError(
            f"tokenizer.vocab_size = {section.vocab_size}, but the text of {what} only yields {reached} tokens: "
            f"{remedy} more text"
        )
    return tokenizer if section.kind == "bpe" else _settled(tokenizer)


def _settled(tokenizer: "Tokenizer") -> "Tokenizer":
    """A unigram tokenizer without what differed from one training on the same text to the next.

    The library sums in the order of a hash map (scores differed by 4e-11 on 2 MB), and adds the bytes that no text held
    in that order too, each 0.0001 above the last. Here those share the least score, and all scores are rounded.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    end, *pieces = state["model"]["vocab"]
    least = min(score for _, score in pieces)
    unseen = least + 256 * 0.0001
    settled = [[piece, round(least if len(piece) == 1 and score < unseen else score, 3)] for piece, score in pieces]
    state["model"]["vocab"] = [end, *sorted(settled, key=lambda each: (-each[1], each[0]))]
    return Tokenizer.from_str(json.dumps(state))


def load_tokenizer(section: TokenizerSection) -> "Tokenizer":
    """An existing tokenizer: kind = file (a tokenizer.json) or hub (by name).

    Raises:
        VocabularyError: it cannot be read, or has no token that ends a text.
    """
    from tokenizers import Tokenizer

    load = Tokenizer.from_file if section.kind == "file" else Tokenizer.from_pretrained
    try:
        tokenizer = load(str(section.name))
    except Exception as err:  # noqa: BLE001 - the library raises bare Exception for every failure
        raise VocabularyError(
            f"tokenizer.name = {section.name!r}: cannot be loaded ({err}); check the path or name"
        ) from None
    end_of_text(tokenizer)
    return tokenizer


def open_tokenizer(path: Path) -> "Tokenizer":
    """A tokenizer.json, set so that text is only text: nothing cut, nothing padded, and a document that mentions the
    end-of-text token spells it out instead of ending there. Not to be changed: who asks again may get the same."""
    return _opened(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=2)
def _opened(text: str) -> "Tokenizer":
    """One for all parts of a source: with ever new ones a process encodes ever slower (after 16, 0.6 times as fast)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_digest(path: Path) -> str:
    """Same digest, same ids of every text: of a tokenizer.json as the library writes it, however it is laid out.

    Raises:
        VocabularyError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        return digest(Tokenizer.from_file(str(path)).to_str())
    except Exception as err:  # noqa: BLE001 - the library raises bare Exception for every failure
        raise VocabularyError(
            f"tokenizer {path} cannot be read ({err}): restore it, or prepare its text again"
        ) from None


def pieces_of(tokenizer: "Tokenizer", size: int) -> list[str]:
    """The tokens of ids 0 to size - 1, as the tokenizer writes them; empty where it leaves an id out."""
    return [tokenizer.id_to_token(id) or "" for id in range(size)]


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Rows that the ids of a tokenizer need: one more than the largest (some published tokenizers leave ids out)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


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
        """Keeps the ids in `used`."""
        ids = np.unique(used).astype(np.int64)
        assert not ids.size or (ids[0] >= 0 and ids[-1] < global_size)
        return cls(global_size, ids)

    @property
    def size(self) -> int:
        """|V_k|."""
        return self.global_size if self.ids is None else len(self.ids)

    def to_local(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers of global ids, any shape.

        Raises:
            VocabularyError: an id is not owned.
        """
        if not ids.size:
            return ids
        for worst in (int(ids.max()), int(ids.min())):
            if not 0 <= worst < self.global_size:
                raise VocabularyError(f"token id {worst} is outside the vocabulary of {self.global_size} ids")
        if self.ids is None:
            return ids
        local = self._rows[ids]
        if local.min() < 0:
            missing = np.unique(ids[local < 0])
            raise VocabularyError(
                f"token id {int(missing[0])} is not among the {self.size} ids of this trimmed vocabulary "
                f"({len(missing)} such ids): the text holds what the source never did"
            )
        return local

    def to_global(self, rows: np.ndarray) -> np.ndarray:
        """Global ids of row numbers, any shape."""
        return rows if self.ids is None else self.ids[rows]

    @cached_property
    def _rows(self) -> np.ndarray:
        """(global size,) int32: the row of each global id, -1 where it is not owned."""
        assert self.ids is not None
        rows = np.full(self.global_size, -1, dtype=np.int32)
        rows[self.ids] = np.arange(len(self.ids), dtype=np.int32)
        return rows


def check_rows(vocabulary: Vocabulary, tokenizer: "Tokenizer", ids: Sequence[int], what: str, source: str) -> None:
    """Refuse a text that a trimmed vocabulary has not every row for.

    Args:
        vocabulary: of the source.
        tokenizer: that gave the ids.
        ids: of the text.
        what: the text, as in "the prompt".
        source: its name.

    Raises:
        VocabularyError: an id is not owned; with the pieces of the text that are not.
    """
    if vocabulary.ids is None:
        return
    missing = np.setdiff1d(ids, vocabulary.ids).tolist()
    if missing:
        pieces = ", ".join(repr(tokenizer.decode([i], skip_special_tokens=False)) for i in missing[:5])
        more = f" and {len(missing) - 5} more" * (len(missing) > 5)
        raise VocabularyError(
            f"{what} holds {pieces}{more}, which source {source} never does, so that its trimmed vocabulary has no "
            "row for it: leave it out, or ask another source"
        )


def unigram_nats(counts: np.ndarray) -> np.ndarray:
    """-log p of each id under the add-one smoothed unigram model: (V,) counts -> (V,) fp64 nats.

    >>> np.exp(-unigram_nats(np.array([1, 0, 5]))).round(3).tolist()
    [0.222, 0.111, 0.667]
    """
    smoothed = counts.astype(np.float64) + 1.0
    return np.log(smoothed.sum()) - np.log(smoothed)
