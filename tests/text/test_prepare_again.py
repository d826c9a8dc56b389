"""Truths about preparing again: once is enough, interrupted is the same as not, and nothing half-made ever counts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from two_sources import KINDS, SYLLABLES, files_of, fingerprints, make_job, write_texts

from dept_ray.config import Job
from dept_ray.errors import VocabularyError
from dept_ray.text import tasks
from dept_ray.text.prepare import TokenizerKind, corpus_folder, global_tokenizer_folder, prepare, run_here, text_folder
from dept_ray.text.tasks import Task

pytestmark = pytest.mark.usefixtures("many_small_parts")


class Killed(BaseException):
    """As if the process had ended."""


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
