"""From raw text to a corpus per source, in four stages of small, repeatable tasks (`tasks`).

    clean   text parts           one task per source
    learn   tokenizer.json       one, or one per source
    pack    one token shard      one task per text part
    index   the corpus           one task per source

A task whose result is there is skipped, so preparing twice does nothing and a killed preparation goes on. Where the
tasks run is the caller's: `run_here` in this process, or Ray next to the text (`on_ray.ingest`). Text stays in its
source's own storage; a global tokenizer alone asks each source for a sample.

    <storage>/data/<source>/text-<key>/     train-00000.parquet ... validation-00000.parquet ... index.json
    <storage>/data/<source>/tokens-<key>/   tokenizer.json counts.safetensors train-00000.tokens ... index.json
    <folder>/data/tokenizers/<key>/         tokenizer.json of a global vocabulary

The one idea: a folder's name says what the job asked for, and a tokens folder that is not finished holds nothing that
was made of another text or tokenizer than those there now (`_begin`). Raw text that changes under a finished corpus is
not noticed: to read it anew, delete the source's folders.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dept_ray.config import Job
from dept_ray.draws import digest
from dept_ray.errors import SourceError, VocabularyError
from dept_ray.source_sections import Source
from dept_ray.text import shards
from dept_ray.text.tasks import Task, clean, index, learn_own, pack, sample, save_tokenizer, text_index, text_parts
from dept_ray.text.tokenizer import load_tokenizer, train_tokenizer

TokenizerKind = Literal["global", "own"]
Report = Callable[[str, int, int], None]
"""Called with (stage, done, of all)."""


class RunAll(Protocol):
    """Runs one function over tasks, anywhere, and gives the results in the order of the tasks."""

    def __call__(self, work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None], /) -> list[Any]: ...


def run_here(work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]:
    """One after the other in this process."""
    results = []
    for task in tasks:
        results.append(work(task))
        done(len(results))
    return results


def prepare(
    job: Job, kind: TokenizerKind, run_all: RunAll = run_here, report: Report = lambda stage, done, of: None
) -> None:
    """Make the corpus of every source of a job, skipping what is there.

    Raises:
        SourceError, VocabularyError: the text, or the tokenizer asked for, cannot be had.
    """
    todo = [s for s in job.sources if not (corpus_folder(job, s.name, kind) / "index.json").exists()]
    if not todo:
        return

    def run(stage: str, work: Callable[[Task], Any], tasks: list[Task]) -> list[Any]:
        if not tasks:
            return []
        report(stage, 0, len(tasks))
        return run_all(work, tasks, lambda n: report(stage, n, len(tasks)))

    def task(source: Source, **more: Any) -> Task:
        return Task(source, corpus_folder(job, source.name, kind), text_folder(job, source), job.tokenizer, **more)

    sampled = _sampled(job) if kind == "global" else []
    needed = [s for s in job.sources if s in todo or s in sampled]
    run("clean", clean, [task(s) for s in needed if not (text_folder(job, s) / "index.json").exists()])
    _check_seen(job, needed)
    if kind == "own":
        for each in map(task, todo):
            _begin(each)
        run("learn", learn_own, [task(s, sample_bytes=job.tokenizer.sample_bytes) for s in todo])
    else:
        shares = _shares(job, sampled)
        samples = run("learn", sample, [task(s, sample_bytes=n) for s, n in zip(sampled, shares, strict=True)])
        blob = _global_tokenizer(job, samples)
        _check_same(job, [s for s in job.sources if s not in todo], blob)
        for each in map(task, todo):
            _begin(each, blob)
    run("pack", pack, [task(s, part=name) for s in todo for name in text_parts(text_folder(job, s))])
    run("index", index, [task(s) for s in todo])


def _check_seen(job: Job, cleaned: list[Source]) -> None:
    """Whether this machine sees what others have written."""
    for source in cleaned:
        if not (folder := text_folder(job, source)).joinpath("index.json").exists():
            where = "`storage`" if source.storage else "`folder`"
            raise SourceError(
                f'source "{source.name}": its text was written to {folder} on another machine, and is not there on '
                f"this one, which divides it into shards: put {where} on a disk that both see"
            )


def _begin(task: Task, tokenizer: bytes | None = None) -> None:
    """Make a tokens folder that holds nothing made of another text, or with another tokenizer than a given one."""
    made_of = digest((task.text / "index.json").read_bytes(), tokenizer or b"").encode()
    mark = task.folder / "made_of"
    if not mark.exists() or mark.read_bytes() != made_of:
        if task.folder.exists():
            shutil.rmtree(task.folder)
        task.folder.mkdir(parents=True)
        shards.write_atomically(mark, made_of)
    if tokenizer is not None:
        shards.write_atomically(task.folder / "tokenizer.json", tokenizer)


# ---------------------------------------------------------------------------------------------- a global tokenizer
def _sampled(job: Job) -> list[Source]:
    """Sources whose text is still needed to train the global tokenizer."""
    trained = job.tokenizer.kind in ("bpe", "unigram")
    missing = trained and not (global_tokenizer_folder(job) / "tokenizer.json").exists()
    return _behind_tokenizer(job) if missing else []


def _behind_tokenizer(job: Job) -> list[Source]:
    """Sources whose text a global tokenizer is trained on: those that were there from the start, to be trained on."""
    return [s for s in job.sources if not s.joined and not s.held_out]


def _shares(job: Job, sampled: list[Source]) -> list[int]:
    """Bytes to sample of each source: in proportion to bytes_k ** temperature."""
    sizes = [text_index(text_folder(job, s))["train"]["bytes"] for s in sampled]
    p = np.array(sizes, dtype=np.float64) ** job.tokenizer.temperature
    return (job.tokenizer.sample_bytes * p / p.sum()).astype(int).tolist()


def _global_tokenizer(job: Job, samples: list[list[str]]) -> bytes:
    """The tokenizer that all sources share, trained on samples or loaded where it is not there yet."""
    folder = global_tokenizer_folder(job)
    if not (folder / "tokenizer.json").exists():
        if job.tokenizer.kind in ("file", "hub"):
            tokenizer = load_tokenizer(job.tokenizer)
        else:
            tokenizer = train_tokenizer((text for texts in samples for text in texts), job.tokenizer, "all sources")
        save_tokenizer(tokenizer, folder)
    return (folder / "tokenizer.json").read_bytes()


def _check_same(job: Job, finished: list[Source], tokenizer: bytes) -> None:
    """Refuse a second global tokenizer beside corpora of a first one: the same id would mean two things."""
    for source in finished:
        folder = corpus_folder(job, source.name, "global")
        if (folder / "tokenizer.json").read_bytes() != tokenizer:
            raise VocabularyError(
                f'source "{source.name}" was prepared with another global tokenizer than the one in '
                f"{global_tokenizer_folder(job)}: delete {folder} and prepare again"
            )


# ---------------------------------------------------------------------------------------------- where things are
def text_key(source: Source) -> str:
    """Digest of all that decides a source's text."""
    of_no_text = {"weight", "storage", "resources", "vocab_size", "tokens", "held_out", "joined"}
    kept = source.model_dump(mode="json", exclude={**dict.fromkeys(of_no_text, True), "of": {"__all__": of_no_text}})
    return digest(json.dumps(kept, sort_keys=True))


def text_folder(job: Job, source: Source) -> Path:
    """Cleaned text of one source."""
    return job.storage_of(source.name) / "data" / source.name / f"text-{text_key(source)}"


def _tokenizer_key(job: Job, texts: list[str]) -> str:
    """Digest of all that decides a tokenizer: of one that is trained its texts too, of one that exists what it is."""
    kept = job.tokenizer.model_dump(mode="json", exclude={"vocabulary", "global_vocab_size"})
    file = Path(job.tokenizer.name or "") if job.tokenizer.kind == "file" else None
    content = [file.read_bytes()] if file is not None and file.is_file() else []
    trained = texts if job.tokenizer.kind in ("bpe", "unigram") else []
    return digest(json.dumps(kept, sort_keys=True), *trained, *content)


def global_tokenizer_folder(job: Job) -> Path:
    """The tokenizer that all sources share."""
    key = _tokenizer_key(job, [text_key(s) for s in _behind_tokenizer(job)])
    return Path(job.folder) / "data" / "tokenizers" / key


def tokenizer_kind(vocabulary: str) -> TokenizerKind:
    """Whose tokenizer a vocabulary of `rounds.methods` needs.

    >>> tokenizer_kind("own"), tokenizer_kind("trimmed")
    ('own', 'global')
    """
    return "own" if vocabulary == "own" else "global"


def corpus_folder(job: Job, name: str, kind: TokenizerKind) -> Path:
    """Prepared tokens of one source under its own or the global tokenizer."""
    source = job.source(name)
    key = _tokenizer_key(job, [text_key(source)]) if kind == "own" else global_tokenizer_folder(job).name
    return job.storage_of(name) / "data" / name / f"tokens-{digest(key, text_key(source))}"


def prepared_sizes(job: Job, kind: TokenizerKind, trimmed: bool) -> dict[str, dict[str, int]]:
    """`vocabulary_sizes` and `tokens` of those sources that are prepared, by name; for `study.plan`."""
    sizes: dict[str, dict[str, int]] = {"vocabulary_sizes": {}, "tokens": {}}
    for source in job.sources:
        folder = corpus_folder(job, source.name, kind)
        if (folder / "index.json").exists():
            corpus = shards.open_corpus(folder, verify=False)
            sizes["vocabulary_sizes"][source.name] = (corpus.trimmed if trimmed else corpus.vocabulary).size
            sizes["tokens"][source.name] = corpus.train.tokens
    return sizes
