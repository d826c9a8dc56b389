"""Under new ids every kind of tokenizer cuts a source's own text as before, and spells every other with rows."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from tiny import SOURCES, document
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dept_ray.errors import VocabularyError
from dept_ray.sections import TokenizerSection
from dept_ray.text.renumber import rows_tokenizer
from dept_ray.text.tokenizer import END_OF_TEXT, Vocabulary, train_tokenizer, vocabulary_size

CORPUS = [document(source, i) for source in SOURCES for i in range(20)]
TEXTS = [*CORPUS[::7], "", "  ", "日本 👍\n", f"a {END_OF_TEXT} b", "zzz    qqq <extra>", "    if x == y[i]:\n\n"]


def ours(kind: str) -> Tokenizer:
    return train_tokenizer(CORPUS, TokenizerSection.model_validate({"kind": kind, "vocab_size": 400}), "tiny")


def with_tokens_beside_the_model(kind: str = "bpe") -> Tokenizer:
    """As GPT-NeoX's: runs of spaces are added tokens, and stand above the model's own ids."""
    tokenizer = ours(kind)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    tokenizer.add_special_tokens(["<extra>"])
    return tokenizer


def with_ends_around_a_text() -> Tokenizer:
    tokenizer = ours("bpe")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """As Llama's: a space is a letter, and a character that is no piece is spelled in bytes."""
    special = ["<unk>", END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text[:200] for text in CORPUS), trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As T5's: unigram with an unknown piece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", END_OF_TEXT], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def used_by(tokenizer: Tokenizer, texts: list[str]) -> Vocabulary:
    """Trimmed to what texts use, and the special tokens."""
    special = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    used = np.unique([i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids])
    return Vocabulary.trimmed(vocabulary_size(tokenizer), np.union1d(used, special))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: ours("bpe"),
    "unigram": lambda: ours("unigram"),
    "tokens beside the model": with_tokens_beside_the_model,
    "tokens beside a unigram model": lambda: with_tokens_beside_the_model("unigram"),
    "ends around a text": with_ends_around_a_text,
    "byte fallback": with_byte_fallback,
    "unigram with unknown": sentencepiece_like,
    "word pieces": word_pieces,
}


@pytest.mark.parametrize("spelled", [True, False], ids=["spelled", "special"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_owned_keeps_its_cut_and_every_text_has_rows(kind: str, spelled: bool):
    tokenizer = KINDS[kind]()
    tokenizer.encode_special_tokens = spelled
    vocabulary = used_by(tokenizer, CORPUS[:25])
    assert vocabulary.size < vocabulary.global_size
    rows = rows_tokenizer(tokenizer, vocabulary)
    size = vocabulary_size(rows)
    assert sorted(rows.get_vocab().values()) == list(range(size)), "an id for each, and none left out"
    assert vocabulary.size < size < len(tokenizer.get_vocab()), "some were needed, and some were not"
    strange = 0
    for text in TEXTS:
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        found = rows.encode(text).ids
        if np.isin(ids, vocabulary.ids).all():
            assert found == vocabulary.to_local(ids).tolist()
        else:
            strange += 1
            assert max(found) < size
        assert rows.decode(found) == tokenizer.decode(ids)
    assert strange, "some text is none of the source's"


def test_a_text_of_all_characters_has_rows_and_comes_back():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 + 0xE000), 0x1F44D, 0x10FFFF]))
    for kind in ("bpe", "unigram", "tokens beside the model"):
        tokenizer = KINDS[kind]()
        rows = rows_tokenizer(tokenizer, used_by(tokenizer, CORPUS[:1]))
        ids = rows.encode(every, add_special_tokens=False).ids
        assert max(ids) < vocabulary_size(rows)
        assert rows.decode(ids) == every


def test_what_nobody_needs_goes_and_parts_of_pieces_stay():
    """`ab` stands nowhere alone and makes `abc`; `xy` makes nothing that is owned."""
    named = {piece: i for i, piece in enumerate(["<end>", "a", "b", "c", "x", "y", "ab", "abc", "xy"])}
    tokenizer = Tokenizer(models.BPE(named, [("a", "b"), ("ab", "c"), ("x", "y")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    rows = rows_tokenizer(tokenizer, Vocabulary.trimmed(len(named), np.array([0, named["abc"], named["x"]])))
    assert rows.get_vocab() == {"<end>": 0, "x": 1, "abc": 2, "a": 3, "b": 4, "c": 5, "y": 6, "ab": 7}
    assert rows.encode("abcxyab").tokens == ["abc", "x", "y", "ab"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_vocabulary_keeps_its_ids(kind: str):
    tokenizer = KINDS[kind]()
    rows = rows_tokenizer(tokenizer, Vocabulary(vocabulary_size(tokenizer)))
    assert rows.get_vocab() == tokenizer.get_vocab()
    assert json.loads(rows.to_str())["post_processor"] is None


def test_a_model_of_a_kind_that_is_not_known_is_refused():
    class Strange:
        encode_special_tokens = False

        def to_str(self) -> str:
            return json.dumps({"added_tokens": [], "model": {"type": "Strange", "vocab": []}})

        def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
            return {"a": 0, "b": 1}

    with pytest.raises(VocabularyError, match="a tokenizer of model Strange"):
        rows_tokenizer(Strange(), Vocabulary.trimmed(2, np.array([1])))  # type: ignore[arg-type]
