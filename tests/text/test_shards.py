"""Truths about shards: every token once, and nothing that was half-written or altered is ever read."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dept_ray.draws import generator
from dept_ray.errors import ShardError
from dept_ray.text.shards import Corpus, ShardFile, Shards, Split, open_corpus, write_index, write_shard

END = 0
VOCABULARY = 300


def draw_documents(label: str, count: int, high: int = 200) -> list[np.ndarray]:
    draw = generator("test", label)
    return [draw.integers(1, high, int(draw.integers(0, 40))) for _ in range(count)]


def write_corpus(folder: Path, dtype: str = "uint16", vocabulary: int = VOCABULARY, high: int = 200) -> Path:
    """Three training shards (the second smaller than any block) and one of validation."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    files: dict[Split, list[ShardFile]] = {"train": [], "validation": []}
    counts: dict[Split, np.ndarray] = {split: np.zeros(vocabulary, np.int64) for split in files}
    shards: list[tuple[Split, int]] = [("train", 30), ("train", 0), ("train", 21), ("validation", 10)]
    for i, (split, count) in enumerate(shards):
        name = f"{split}-{len(files[split]):05d}.tokens"
        documents = draw_documents(f"{i}", count, high)
        tokens, found, checksum = write_shard(folder / name, documents, END, dtype)
        files[split].append(ShardFile(name, tokens, checksum, text_bytes=100 + i))
        counts[split][: len(found)] += found
    write_index(folder, files["train"], files["validation"], dtype=dtype, end_of_text=END, counts=counts)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return open_corpus(folder)


def refused(folder: Path) -> str:
    with pytest.raises(ShardError) as caught:
        open_corpus(folder)
    assert "run `dept-ray prepare`" in str(caught.value)
    return str(caught.value)


def test_a_shard_is_its_documents_between_ends_of_text(tmp_path: Path) -> None:
    tokens, counts, _ = write_shard(
        tmp_path / "a.tokens", [np.array([5, 2]), np.array([], int), np.array([2])], END, "uint16"
    )
    assert np.fromfile(tmp_path / "a.tokens", np.uint16).tolist() == [0, 5, 2, 0, 0, 2, 0]
    assert tokens == 7
    assert counts.tolist() == [4, 0, 2, 0, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokens"]


def test_what_was_written_is_what_is_opened(corpus: Corpus) -> None:
    stored = [
        np.concatenate([[END], *(np.append(d, END) for d in draw_documents(f"{i}", n))]) for i, n in ((0, 30), (2, 21))
    ]
    np.testing.assert_array_equal(corpus.train.map(0), stored[0])
    np.testing.assert_array_equal(corpus.train.map(2), stored[1])
    assert corpus.train.tokens == len(stored[0]) + 1 + len(stored[1])
    assert (corpus.train.text_bytes, corpus.validation.text_bytes) == (100 + 101 + 102, 103)
    assert corpus.counts.sum() == corpus.train.tokens
    assert corpus.counts[END] == 30 + 1 + 1 + 21 + 1
    assert corpus.vocabulary.size == VOCABULARY


def test_the_trimmed_vocabulary_holds_every_id_of_both_splits_and_the_end_of_text(corpus: Corpus) -> None:
    found = np.unique(
        np.concatenate([split.map(i) for split in (corpus.train, corpus.validation) for i in range(len(split.files))])
    )
    np.testing.assert_array_equal(corpus.used, found)
    assert corpus.trimmed.size == len(found) < VOCABULARY
    for vocabulary in (corpus.vocabulary, corpus.trimmed):
        assert np.exp(-corpus.unigram_nats(vocabulary)).sum() == pytest.approx(1)


@pytest.mark.parametrize("context", [1, 7, 32, 128])
def test_blocks_predict_every_token_of_a_shard_but_the_first_once_and_in_order(corpus: Corpus, context: int) -> None:
    starts = corpus.train.starts(context)
    assert [starts[1], starts[2] - starts[1]] == [(corpus.train.files[0].tokens - 1) // context, 0]
    blocks = corpus.train.read(np.arange(starts[-1]), context)
    assert blocks.shape == (starts[-1], context + 1)
    for shard in (0, 2):
        tokens = corpus.train.map(shard)
        mine = blocks[starts[shard] : starts[shard + 1]]
        whole = len(mine) * context
        assert len(tokens) - 1 - whole < context  # what is left does not fill a block
        np.testing.assert_array_equal(mine[:, 1:].ravel(), tokens[1 : whole + 1])
        np.testing.assert_array_equal(mine[:, :-1].ravel(), tokens[:whole])


def test_blocks_come_in_the_order_they_are_asked_for(corpus: Corpus) -> None:
    everything = corpus.train.read(np.arange(corpus.train.starts(16)[-1]), 16)
    asked = generator("test").integers(0, len(everything), 200)
    np.testing.assert_array_equal(corpus.train.read(asked, 16), everything[asked])
    assert corpus.train.read(np.empty(0, np.int64), 16).shape == (0, 17)


@pytest.mark.parametrize(("context", "rows"), [(7, 3), (32, 2), (10_000, 1), (1, 64)])
def test_a_sweep_predicts_every_token_but_the_first_exactly_once(corpus: Corpus, context: int, rows: int) -> None:
    pairs = []
    for inputs, targets in corpus.train.sweep(context, rows):
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= rows
        assert inputs.shape[1] == context
        real = targets >= 0
        assert (targets[~real] == -1).all()
        pairs += zip(inputs[real].tolist(), targets[real].tolist(), strict=True)
    stored = [corpus.train.map(i).tolist() for i in range(3)]
    assert pairs == [pair for tokens in stored for pair in pairwise(tokens)]


def test_large_vocabularies_keep_their_ids(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "large", "uint32", vocabulary=250_000, high=250_000))
    assert corpus.train.map(0).dtype == np.uint32
    assert corpus.train.read(np.arange(3), 64).max() > 65_535
    assert corpus.used.max() > 65_535


def test_the_fingerprint_tells_tokens_and_tokenizers_apart(folder: Path, tmp_path: Path) -> None:
    same, other_tokens = write_corpus(tmp_path / "same"), write_corpus(tmp_path / "other", high=100)
    prints = {open_corpus(each).fingerprint for each in (folder, same)}
    assert len(prints) == 1
    assert open_corpus(other_tokens).fingerprint not in prints


def test_shards_are_read_only_and_cross_processes(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="read-only"):
        corpus.train.map(0)[0] = 1
    there = pickle.loads(pickle.dumps(Shards(corpus.folder, corpus.train.files, "uint16")))
    np.testing.assert_array_equal(there.read(np.arange(5), 8), corpus.train.read(np.arange(5), 8))


# Damage.


def test_a_half_written_shard_is_refused(folder: Path) -> None:
    path = folder / "train-00002.tokens"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    message = refused(folder)
    assert f"shard {path} has {size // 2} bytes, its index says {size}" in message
    assert f"delete the folder {folder}" in message


def test_an_altered_byte_is_noticed(folder: Path) -> None:
    path = folder / "validation-00000.tokens"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"shard {path} does not match its fingerprint" in refused(folder)
    open_corpus(folder, verify=False)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-00000.tokens").unlink()
    assert f"shard {folder / 'train-00000.tokens'} is missing" in refused(folder)


def test_a_folder_without_an_index_is_no_corpus(folder: Path) -> None:
    (folder / "index.json").unlink()
    assert f"{folder} holds no prepared tokens (no index.json)" in refused(folder)
    assert "holds no prepared tokens" in refused(folder / "nowhere")


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 1, "train": 3}'])
def test_a_garbage_index_is_named(folder: Path, garbage: bytes) -> None:
    (folder / "index.json").write_bytes(garbage)
    assert f"{folder / 'index.json'} cannot be read" in refused(folder)


def test_an_index_of_another_format_is_refused(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 2}))
    assert "format 2, this version reads format 1" in refused(folder)


def test_missing_broken_or_foreign_counts_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "counts.safetensors"
    other = (write_corpus(tmp_path / "other", high=2) / "counts.safetensors").read_bytes()
    from safetensors.numpy import load, save

    counts = load(path.read_bytes())
    counts["train"][7] += 1
    for data in (None, b"garbage", other[:-1], save(counts)):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        else:
            assert f"{path} cannot be read" in refused(folder)
            path.touch()
        assert f"{path} cannot be read" in refused(folder)


def test_another_tokenizer_than_the_one_that_made_the_tokens_is_noticed(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ }")
    assert f"{folder / 'tokenizer.json'} cannot be read (it is not the one that made these tokens)" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert str(folder / "tokenizer.json") in refused(folder)


def test_a_shard_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    def breaking() -> "list[np.ndarray]":
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tokens", (each for each in breaking()), END, "uint16")
    assert list(tmp_path.iterdir()) == []
