"""Truths about tokenizers and vocabularies: exact sizes, texts that come back, the same text the same tokenizer."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dept_ray.draws import generator
from dept_ray.errors import VocabularyError
from dept_ray.sections import TokenizerSection
from dept_ray.text.tokenizer import (
    END_OF_TEXT,
    Vocabulary,
    end_of_text,
    load_tokenizer,
    open_tokenizer,
    train_tokenizer,
    unigram_nats,
    vocabulary_size,
)

KINDS = ("bpe", "unigram")


def words(count: int) -> str:
    """Drawn words of drawn syllables, and some of them not ASCII."""
    draw = generator("test words")
    syllables = ["ba", "lor", "zü", "ne", "qui", "th", "os", "语", "к"]
    return " ".join("".join(draw.choice(syllables, int(draw.integers(1, 5)))) for _ in range(count))


TEXTS = [words(3000)[start : start + 400] for start in range(0, 8000, 400)]


def section(kind: str, vocab_size: int = 400, name: str | None = None) -> TokenizerSection:
    return TokenizerSection.model_validate({"kind": kind, "vocab_size": vocab_size, "name": name})


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of either kind, trained on `TEXTS`."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, section(request.param), "test").to_str())
    return path


def test_training_reaches_exactly_the_size_asked_for_and_id_0_ends_a_text(path: Path) -> None:
    tokenizer = open_tokenizer(path)
    assert tokenizer.get_vocab_size() == vocabulary_size(tokenizer) == 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert end_of_text(tokenizer) == tokenizer.token_to_id(END_OF_TEXT) == 0


@pytest.mark.parametrize(
    "text",
    [
        "plain words of the text",
        "",
        " ",
        "  two  spaces\t\ttabs\n\n\r\nlines \n",
        "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and flags \U0001f1e9\U0001f1ea",
        "漢字かな交じり文。한국어",
        "".join(map(chr, range(1, 256))),
        "\ufeffbom \u200b zero \u0000 nul \x1b[0m \ufffd",
        "".join(TEXTS),
    ],
)
def test_every_text_comes_back(path: Path, text: str) -> None:
    tokenizer = open_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_text_that_mentions_the_end_of_text_does_not_end_there(path: Path) -> None:
    tokenizer = open_tokenizer(path)
    ids = tokenizer.encode(f"one{END_OF_TEXT}two", add_special_tokens=False).ids
    assert end_of_text(tokenizer) not in ids
    assert tokenizer.decode(ids) == f"one{END_OF_TEXT}two"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer(kind: str) -> None:
    first, second = (train_tokenizer(TEXTS, section(kind, 350), "test").to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_text_is_refused_with_the_size_it_reaches(kind: str) -> None:
    with pytest.raises(VocabularyError) as caught:
        train_tokenizer(["abcd abcd abce abce bcd bcd abc"], section(kind, 5000), 'source "de"')
    message = str(caught.value)
    assert 'tokenizer.vocab_size = 5000, but the text of source "de" only yields' in message
    assert message.endswith("or give it more text" if "set tokenizer" in message else "tokens: give it more text")
    reached = int(message.partition("only yields ")[2].split()[0])
    if reached >= 258:  # less than that, a job may not ask for
        assert f"set tokenizer.vocab_size to {reached} or less" in message
        trained = train_tokenizer(["abcd abcd abce abce bcd bcd abc"], section(kind, reached), "test")
        assert vocabulary_size(trained) == reached


def test_no_text_at_all_is_refused_without_a_size_that_no_job_may_ask_for() -> None:
    with pytest.raises(VocabularyError, match=r"yields 257 tokens: give it more text$"):
        train_tokenizer([], section("bpe"), "test")


# Existing tokenizers.


def test_a_file_is_loaded_as_it_was_saved(path: Path) -> None:
    assert load_tokenizer(section("file", name=str(path))).to_str() == path.read_text()


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("none.json", "broken.json"):
        with pytest.raises(VocabularyError, match=rf"tokenizer.name = .*{name}.*cannot be loaded .*; check the path"):
            load_tokenizer(section("file", name=str(tmp_path / name)))


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match=r"no token that ends a text .*add <\|endoftext\|> to its special tokens"):
        load_tokenizer(section("file", name=str(tmp_path / "tokenizer.json")))


def test_a_tokenizer_that_cuts_and_pads_is_opened_as_one_that_does_not(path: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_file(str(path))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path / "tokenizer.json")
    assert opened.decode(opened.encode(TEXTS[0], add_special_tokens=False).ids) == TEXTS[0]


def test_ids_that_are_left_out_count_as_rows(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_size(load_tokenizer(section("file", name=str(tmp_path / "tokenizer.json")))) == 70_001


# Vocabularies.


def test_local_and_global_ids_are_each_others_inverse() -> None:
    used = np.array([0, 3, 7, 8, 99])
    trimmed = Vocabulary.trimmed(100, np.array([99, 3, 7, 0, 8, 3]))
    assert trimmed.size == 5
    assert trimmed.ids is not None
    np.testing.assert_array_equal(trimmed.ids, used)
    shuffled = generator("test").permutation(np.tile(used, 4)).reshape(4, 5).astype(np.uint16)
    np.testing.assert_array_equal(trimmed.to_global(trimmed.to_local(shuffled)), shuffled)
    np.testing.assert_array_equal(trimmed.to_local(used), np.arange(5))
    full = Vocabulary(100)
    assert full.size == 100
    np.testing.assert_array_equal(full.to_local(shuffled), shuffled)
    np.testing.assert_array_equal(full.to_global(shuffled), shuffled)


def test_no_ids_have_no_rows() -> None:
    for vocabulary in (Vocabulary(10), Vocabulary.trimmed(10, np.array([0, 3]))):
        assert vocabulary.to_local(np.empty(0, np.uint16)).shape == (0,)


@pytest.mark.parametrize("vocabulary", [Vocabulary(10), Vocabulary.trimmed(10, np.array([0, 3, 9]))])
@pytest.mark.parametrize("worst", [10, 65_535, -1])
def test_an_id_outside_the_vocabulary_is_refused(vocabulary: Vocabulary, worst: int) -> None:
    with pytest.raises(VocabularyError, match=f"token id {worst} is outside the vocabulary of 10 ids"):
        vocabulary.to_local(np.array([[0, 3], [worst, 9]]))


def test_an_id_that_was_trimmed_away_is_refused() -> None:
    with pytest.raises(VocabularyError, match=r"token id 4 is not among the 3 ids of this trimmed vocabulary \(2 such"):
        Vocabulary.trimmed(10, np.array([0, 3, 9])).to_local(np.array([0, 5, 4, 5]))


def test_a_vocabulary_crosses_processes() -> None:
    vocabulary = Vocabulary.trimmed(10, np.array([0, 3]))
    vocabulary.to_local(np.array([3]))
    assert pickle.loads(pickle.dumps(vocabulary)).to_local(np.array([3])).tolist() == [1]


def test_the_unigram_model_sums_to_one_and_gives_what_never_occurred_a_chance() -> None:
    counts = np.array([0, 0, 5, 1_000_000])
    p = np.exp(-unigram_nats(counts))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(p, (counts + 1) / (counts.sum() + 4), rtol=1e-12)
    assert p[0] > 0


def test_what_is_saved_is_plain_json(path: Path) -> None:
    assert json.loads(path.read_text())["model"]["type"] in ("BPE", "Unigram")
