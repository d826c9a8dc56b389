"""Truths about preparing: corpora spell their documents and nothing else, samples are as large as asked for, and what
cannot be had is named. Twice, and after a kill: test_prepare_again."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from two_sources import KINDS, SYLLABLES, corpora, files_of, fingerprints, make_job, write_texts

from dept_ray.config import Job
from dept_ray.errors import SourceError, VocabularyError
from dept_ray.text import prepare as prepare_module
from dept_ray.text import tasks
from dept_ray.text.prepare import (
    TokenizerKind,
    corpus_folder,
    global_tokenizer_folder,
    prepare,
    prepared_sizes,
    run_here,
    text_folder,
)
from dept_ray.text.shards import Corpus, Shards, open_corpus
from dept_ray.text.sources import documents
from dept_ray.text.tasks import Task, text_parts

pytestmark = pytest.mark.usefixtures("many_small_parts")


def texts_of(corpus: Corpus, shards: Shards) -> list[str]:
    """The documents that a split's tokens spell."""
    tokenizer, found = corpus.tokenizer, []
    for i in range(len(shards.files)):
        tokens = shards.map(i)
        ends = np.flatnonzero(tokens == corpus.end_of_text)
        assert ends[0] == 0
        assert ends[-1] == len(tokens) - 1
        found += [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    return found


def all_tokens(shards: Shards) -> np.ndarray:
    return np.concatenate([shards.map(i) for i in range(len(shards.files))])


# What comes out.


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_corpus_spell_its_documents_in_order(job: Job, kind: TokenizerKind) -> None:
    prepare(job, kind)
    for source in job.sources:
        corpus = open_corpus(corpus_folder(job, source.name, kind))
        for split, shards in (("train", corpus.train), ("validation", corpus.validation)):
            expected = [text for side, text in documents(source) if side == split]
            assert texts_of(corpus, shards) == expected
            assert shards.text_bytes == len("".join(expected).encode())
        assert len(corpus.train.files) > 2
        assert corpus.counts.sum() == corpus.train.tokens
        assert corpus.vocabulary.size == 300
        np.testing.assert_array_equal(corpus.counts > 0, np.bincount(all_tokens(corpus.train), minlength=300) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trimmed_vocabulary_owns_all_of_train_and_validation(job: Job, kind: TokenizerKind) -> None:
    prepare(job, kind)
    for corpus in corpora(job, kind).values():
        for shards in (corpus.train, corpus.validation):
            tokens = all_tokens(shards)
            rows = corpus.trimmed.to_local(tokens)
            np.testing.assert_array_equal(corpus.trimmed.to_global(rows), tokens)
        assert len(np.setdiff1d(all_tokens(corpus.validation), all_tokens(corpus.train))) > 0
        assert corpus.trimmed.size < corpus.vocabulary.size


def test_the_size_of_a_part_changes_the_number_of_shards_and_no_document(
    texts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, one = make_job(texts, tmp_path / "many"), make_job(texts, tmp_path / "one")
    # The sample for a tokenizer takes parts in a drawn order; BPE counts words, so that the order does not matter.
    prepare(many, "own")
    monkeypatch.setattr(tasks, "PART_BYTES", 1 << 30)
    prepare(one, "own")
    for name, whole in corpora(one, "own").items():
        parts = corpora(many, "own")[name]
        assert len(whole.train.files) == 1 < len(parts.train.files)
        assert parts.train.tokens == whole.train.tokens + len(parts.train.files) - 1  # an end of text each
        assert parts.train.text_bytes == whole.train.text_bytes
        assert texts_of(parts, parts.train) == texts_of(whole, whole.train)


def test_text_that_another_machine_keeps_to_itself_is_told_before_anything_is_made_of_it(job: Job) -> None:
    def elsewhere(work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]:
        return [None] * len(tasks)

    with pytest.raises(SourceError, match=r'"de": its text was written to .* on another machine.*put `folder` on'):
        prepare(job, "own", elsewhere)
    assert not list(Path(job.folder).rglob("tokens-*"))


def test_own_and_global_tokenizers_share_the_cleaned_text_and_nothing_else(job: Job) -> None:
    prepare(job, "own")
    before = files_of(Path(job.folder))
    prepare(job, "global")
    after = files_of(Path(job.folder))
    assert before.items() <= after.items()
    assert not [name for name in after.keys() - before.keys() if "/text-" in name]
    shared = (global_tokenizer_folder(job) / "tokenizer.json").read_bytes()
    for name in SYLLABLES:
        own, common = (corpus_folder(job, name, kind) / "tokenizer.json" for kind in KINDS)
        assert own.read_bytes() != common.read_bytes() == shared
        assert corpora(job, "own")[name].train.text_bytes == corpora(job, "global")[name].train.text_bytes


def test_a_source_stays_in_its_own_storage(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    home = make_job(texts, tmp_path / "home")
    away = make_job([texts[0], {**texts[1], "storage": str(tmp_path / "eu")}], tmp_path / "away")
    for kind in KINDS:
        prepare(home, kind)
        prepare(away, kind)
        assert fingerprints(away, kind) == fingerprints(home, kind)
    assert {path.name for path in (tmp_path / "eu" / "data").iterdir()} == {"en"}
    assert {path.name for path in (tmp_path / "away" / "data").iterdir()} == {"de", "tokenizers"}


def test_an_existing_tokenizer_serves_as_it_is(job: Job, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    prepare(job, "global")
    path = tmp_path / "mine.json"
    path.write_bytes((global_tokenizer_folder(job) / "tokenizer.json").read_bytes())
    for kind in KINDS:
        loaded = make_job(texts, tmp_path / "loaded", kind="file", name=str(path))
        prepare(loaded, kind)
        assert fingerprints(loaded, kind) == fingerprints(job, "global")


def test_a_document_that_mentions_the_end_of_text_stays_one_document(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    with open(tmp_path / "text" / "de-train.jsonl", "a") as file:
        file.write(json.dumps({"text": "before<|endoftext|>after"}))
    job = make_job(texts, tmp_path / "job")
    prepare(job, "own")
    corpus = corpora(job, "own")["de"]
    assert texts_of(corpus, corpus.train)[-1] == "before<|endoftext|>after"


def test_sizes_are_those_of_the_sources_that_are_prepared(job: Job) -> None:
    assert prepared_sizes(job, "own", trimmed=False) == {"vocabulary_sizes": {}, "tokens": {}}
    prepare(job, "own")
    shutil.rmtree(corpus_folder(job, "en", "own"))
    tokens = corpora_of(job, "de").train.tokens
    assert prepared_sizes(job, "own", trimmed=False) == {"vocabulary_sizes": {"de": 300}, "tokens": {"de": tokens}}
    assert prepared_sizes(job, "own", trimmed=True)["vocabulary_sizes"]["de"] == corpora_of(job, "de").trimmed.size


def corpora_of(job: Job, name: str) -> Corpus:
    return open_corpus(corpus_folder(job, name, "own"))


def test_progress_is_told_by_stage(job: Job) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(job, "own", report=lambda *each: told.append(each))
    parts = sum(len(text_parts(text_folder(job, source))) for source in job.sources)
    expected = {"clean": 2, "learn": 2, "pack": parts, "index": 2}
    assert told == [(stage, done, of) for stage, of in expected.items() for done in range(of + 1)]


# Samples.


def sample_task(job: Job, sample_bytes: int) -> Task:
    source = job.sources[0]
    return Task(source, Path(), text_folder(job, source), job.tokenizer, sample_bytes=sample_bytes)


@pytest.mark.parametrize("sample_bytes", [1, 2, 777, 5000, 9999])
def test_a_sample_is_as_large_as_asked_for_to_the_character(job: Job, sample_bytes: int) -> None:
    prepare(job, "own")
    taken = tasks.sample(sample_task(job, sample_bytes))
    assert sample_bytes - 1 <= len("".join(taken).encode()) <= sample_bytes
    whole = {text for side, text in documents(job.sources[0]) if side == "train"}
    assert set(taken[:-1]) <= whole
    assert any(text.startswith(taken[-1]) for text in whole)
    assert set(tasks.sample(sample_task(job, 1 << 30))) == whole


def test_a_sample_does_not_read_on_for_the_half_of_a_character(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(job, "own")
    read: list[str] = []

    def three_bytes_each(path: Path) -> Any:
        for i in range(100):
            read.append(f"{path.name} {i}")
            yield "語"

    monkeypatch.setattr(tasks, "read_part", three_bytes_each)
    assert "".join(tasks.sample(sample_task(job, 10))) == "語語語"
    assert len(read) == 4


def test_a_temperature_of_0_shares_the_sample_equally_and_of_1_by_size(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    with open(tmp_path / "text" / "en-train.jsonl", "a") as file:
        file.writelines(json.dumps({"text": f"more {i} " * 40}) + "\n" for i in range(200))
    for temperature in (0, 0.3, 1):
        job = make_job(texts, tmp_path / "job", temperature=temperature, sample_bytes=10_000)
        asked: dict[str, int] = {}

        def watching(work: Callable[[Task], Any], some: list[Task], done: Callable[[int], None]) -> list[Any]:
            if work is tasks.sample:
                asked.update({task.source.name: task.sample_bytes for task in some})  # noqa: B023 - called in this turn
            return run_here(work, some, done)

        prepare(job, "global", run_all=watching)
        sizes = {name: corpus.train.text_bytes for name, corpus in corpora(job, "global").items()}
        assert sizes["en"] > 3 * sizes["de"]
        assert asked["en"] / asked["de"] == pytest.approx((sizes["en"] / sizes["de"]) ** temperature, rel=1e-2)
        assert 9_998 <= sum(asked.values()) <= 10_000


# What cannot be had.


def test_an_empty_source_is_named(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "text" / "en-train.jsonl").write_text("")
    job = make_job(texts, tmp_path / "job")
    with pytest.raises(SourceError, match='source "en": no training text in it'):
        prepare(job, "own")
    assert not (text_folder(job, job.sources[1]) / "index.json").exists()


@pytest.mark.parametrize(("kind", "whose"), [("own", 'source "de"'), ("global", "all sources")])
def test_too_little_text_for_a_tokenizer_is_named(
    texts: list[dict[str, Any]], tmp_path: Path, kind: TokenizerKind, whose: str
) -> None:
    job = make_job(texts, tmp_path / "job", vocab_size=20_000)
    with pytest.raises(VocabularyError, match=f"vocab_size = 20000, but the text of {whose} only yields"):
        prepare(job, kind)
    assert not (corpus_folder(job, "de", kind) / "index.json").exists()


def test_a_tokenizer_that_cannot_be_loaded_is_named(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(VocabularyError, match=r"none\.json"):
            prepare(make_job(texts, tmp_path / "job", kind="file", name=str(tmp_path / "none.json")), kind)


def test_what_only_a_run_of_this_job_decides_does_not_ask_for_other_folders(job: Job) -> None:
    other = job.model_copy(update={"seed": 7, "method": "glob"})
    for kind in KINDS:
        assert corpus_folder(other, "de", kind) == corpus_folder(job, "de", kind)
    larger = job.model_copy(update={"tokenizer": job.tokenizer.model_copy(update={"vocab_size": 301})})
    assert corpus_folder(larger, "de", "own") != corpus_folder(job, "de", "own")
    assert text_folder(larger, larger.sources[0]) == text_folder(job, job.sources[0])
    assert prepare_module.text_key(job.sources[0]) != prepare_module.text_key(job.sources[1])
