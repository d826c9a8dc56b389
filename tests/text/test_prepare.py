"""Truths about preparing: once is enough, interrupted is the same as not, and nothing half-made ever counts."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.errors import SourceError, VocabularyError
from dept_ray.jobfile import parse_job
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

KINDS: tuple[TokenizerKind, ...] = ("own", "global")
PART_BYTES = 4000
SYLLABLES = {"de": "ba lor zü ne ß", "en": "th os qui ing er"}


class Killed(BaseException):
    """As if the process had ended."""


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Two sources of made-up words, some 15 kB each, validation named."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for name, syllables in SYLLABLES.items():
        draw = generator("test", name, seed)
        words = ["".join(draw.choice(syllables.split(), int(draw.integers(1, 4)))) for _ in range(400)]
        texts = [f"{name} {i}: " + " ".join(draw.choice(words, 60)) for i in range(count + 4)]
        for part, some in (
            ("train", texts[:count]),
            ("validation", [*texts[count:], f"only in validation: {name} \u2603"]),
        ):
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        tables.append(
            {
                "name": name,
                "kind": "files",
                "paths": str(folder / f"{name}-train.jsonl"),
                "validation_paths": str(folder / f"{name}-validation.jsonl"),
            }
        )
    return tables


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PART_BYTES", PART_BYTES)
    # Nothing here takes the power away, and 20 files a preparation wait for the disk ten times as long as they compute.
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def texts(tmp_path: Path) -> list[dict[str, Any]]:
    return write_texts(tmp_path / "text")


@pytest.fixture
def job(texts: list[dict[str, Any]], tmp_path: Path) -> Job:
    return make_job(texts, tmp_path / "job")


def make_job(texts: list[dict[str, Any]], folder: Path, **tokenizer: Any) -> Job:
    return parse_job(
        {"name": "test", "folder": str(folder), "sources": texts, "tokenizer": {"vocab_size": 300, **tokenizer}}
    )


def corpora(job: Job, kind: TokenizerKind) -> dict[str, Corpus]:
    return {source.name: open_corpus(corpus_folder(job, source.name, kind)) for source in job.sources}


def fingerprints(job: Job, kind: TokenizerKind) -> dict[str, str]:
    return {name: corpus.fingerprint for name, corpus in corpora(job, kind).items()}


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


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


def killing(after: int, of: Callable[[Task], Any]) -> Callable[..., list[Any]]:
    """A `run_all` in which the process ends when that many tasks of one stage are done."""

    def run_all(work: Callable[[Task], Any], some: list[Task], done: Callable[[int], None]) -> list[Any]:
        if work is not of:
            return run_here(work, some, done)
        run_here(work, some[:after], done)
        raise Killed

    return run_all


def never(work: Callable[[Task], Any], some: list[Task], done: Callable[[int], None]) -> list[Any]:
    raise AssertionError(f"{work} was run again on {some}")


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


# Twice, and after a kill.


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_twice_does_nothing(job: Job, kind: TokenizerKind) -> None:
    prepare(job, kind)
    before = files_of(Path(job.folder))
    prepare(job, kind, run_all=never, report=lambda *each: pytest.fail(f"reported {each}"))
    assert files_of(Path(job.folder)) == before
    assert not [name for name in before if name.endswith((".tmp", "-00000.safetensors"))]


STAGES = [("own", work) for work in (tasks.clean, tasks.learn_own, tasks.pack, tasks.index)]
STAGES += [("global", work) for work in (tasks.clean, tasks.sample, tasks.pack, tasks.index)]


@pytest.mark.parametrize(("kind", "work"), STAGES, ids=[f"{kind}-{work.__name__}" for kind, work in STAGES])
@pytest.mark.parametrize("after", [0, 1])
def test_a_killed_preparation_goes_on_to_the_same_corpora(
    texts: list[dict[str, Any]], tmp_path: Path, kind: TokenizerKind, work: Callable[[Task], Any], after: int
) -> None:
    whole, killed = make_job(texts, tmp_path / "whole"), make_job(texts, tmp_path / "killed")
    prepare(whole, kind)
    with pytest.raises(Killed):
        prepare(killed, kind, run_all=killing(after, work))
    before = files_of(Path(killed.folder))
    prepare(killed, kind)
    assert fingerprints(killed, kind) == fingerprints(whole, kind)
    redone = {name for name, time in before.items() if files_of(Path(killed.folder)).get(name, time) != time}
    assert not [name for name in redone if name.endswith((".tokens", ".parquet"))]  # what was done stood


def test_a_kill_between_two_parts_of_a_text_leaves_none_of_them_behind(
    job: Job, texts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_job(texts, tmp_path / "whole")
    prepare(whole, "own")
    folder = text_folder(job, job.sources[0])
    written = tasks._parquet

    def killed_at_the_second(some: list[str]) -> bytes:
        if (folder / "train-00000.parquet").exists():
            raise Killed
        return written(some)

    monkeypatch.setattr(tasks, "_parquet", killed_at_the_second)
    with pytest.raises(Killed):
        prepare(job, "own")
    assert [path.name for path in folder.iterdir()] == ["train-00000.parquet"]
    monkeypatch.setattr(tasks, "_parquet", written)
    prepare(job, "own")
    assert fingerprints(job, "own") == fingerprints(whole, "own")


def test_leftovers_never_count(job: Job, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = make_job(texts, tmp_path / "whole")
    prepare(whole, "own")
    text, corpus = text_folder(job, job.sources[0]), corpus_folder(job, "de", "own")
    for folder in (text, corpus):
        folder.mkdir(parents=True)
    for name in ("train-00000.parquet", "train-00099.parquet", "index.json.1.tmp", "validation-00000.parquet.2.tmp"):
        (text / name).write_bytes(b"half")
    for name in ("train-00000.tokens", "train-00099.tokens", "train-00001.tokens.3.tmp", "index.json.4.tmp"):
        (corpus / name).write_bytes(b"half")
    (corpus / "train-00001.safetensors").write_bytes(b"made of another text")
    (corpus / "tokenizer.json").write_bytes(b"made of another text")
    prepare(job, "own")
    assert fingerprints(job, "own") == fingerprints(whole, "own")


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_changed_while_the_preparation_was_down_is_not_mixed_with_the_old(
    texts: list[dict[str, Any]], tmp_path: Path, kind: TokenizerKind
) -> None:
    job = make_job(texts, tmp_path / "job")
    with pytest.raises(Killed):
        prepare(job, kind, run_all=killing(3, tasks.pack))
    assert (corpus_folder(job, "de", kind) / "train-00000.safetensors").exists()
    write_texts(tmp_path / "text", count=60, seed=1)
    for folder in (*(text_folder(job, source) for source in job.sources), global_tokenizer_folder(job)):
        shutil.rmtree(folder, ignore_errors=True)
    prepare(job, kind)
    new = make_job(texts, tmp_path / "new")
    prepare(new, kind)
    assert fingerprints(job, kind) == fingerprints(new, kind)


def test_a_second_global_tokenizer_beside_corpora_of_the_first_is_refused(job: Job, tmp_path: Path) -> None:
    prepare(job, "global")
    write_texts(tmp_path / "text", seed=1)
    for folder in (text_folder(job, job.sources[0]), corpus_folder(job, "de", "global"), global_tokenizer_folder(job)):
        shutil.rmtree(folder)
    with pytest.raises(VocabularyError, match='source "en" was prepared with another global tokenizer'):
        prepare(job, "global")


def test_only_the_text_that_is_needed_is_cleaned_again(job: Job) -> None:
    prepare(job, "global")
    shutil.rmtree(text_folder(job, job.sources[0]))  # of a finished corpus, to save room
    shutil.rmtree(corpus_folder(job, "en", "global"))
    prepare(job, "global")
    assert not text_folder(job, job.sources[0]).exists()
    assert set(fingerprints(job, "global")) == set(SYLLABLES)


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
