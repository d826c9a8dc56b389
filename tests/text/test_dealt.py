"""The text of several sources dealt at random: all of it, each document once, and on the side where it was."""

from pathlib import Path

import pytest
from tiny import tiny_job, write_texts

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import parse_job
from dept_ray.text.prepare import text_key
from dept_ray.text.sources import documents

SHARES = 3


def dealt(folder: Path, **changes: object) -> Job:
    of = write_texts(folder / "text")
    sources = [{"name": f"share-{n}", "kind": "dealt", "of": of, "share": n, "shares": SHARES} for n in range(SHARES)]
    return parse_job({"name": "dealt", "folder": str(folder), "sources": [{**s, **changes} for s in sources]})


def test_the_shares_are_all_of_the_text_and_each_document_is_in_one(tmp_path: Path) -> None:
    whole = [d for source in tiny_job(tmp_path).sources for d in documents(source)]
    shares = [list(documents(source)) for source in dealt(tmp_path).sources]
    assert sorted(d for share in shares for d in share) == sorted(whole)


def test_every_share_has_of_every_source(tmp_path: Path) -> None:
    words = {"numbers": "hundred and", "code": "self.total"}
    for source in dealt(tmp_path).sources:
        texts = [text for side, text in documents(source) if side == "train"]
        assert 30 < len(texts) < 90, "a third of 180"
        for word in words.values():
            assert any(word in text for text in texts)


def test_a_share_is_a_text_of_its_own_whatever_its_parts_weigh(tmp_path: Path) -> None:
    first, second, _ = dealt(tmp_path).sources
    assert text_key(first) != text_key(second.model_copy(update={"name": first.name}))
    heavier = [part.model_copy(update={"weight": 2.0}) for part in first.of]  # pyright: ignore
    assert text_key(first) == text_key(first.model_copy(update={"of": tuple(heavier)}))


def test_paths_in_what_is_dealt_are_absolute_and_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of = [{"name": "a", "kind": "files", "paths": "a.txt"}]
    jobs = [
        parse_job({"name": "x", "sources": [{"name": "s", "kind": "dealt", "of": of, "share": 0, "shares": 1}]})
        for of in (of, [{**of[0], "paths": "b.txt"}])
    ]
    assert jobs[0].sources[0].of[0].paths == (str(tmp_path / "a.txt"),)  # pyright: ignore
    assert jobs[0].fingerprint == jobs[1].fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 3}, r"share-0\.share = 3: of sources\.share-0\.shares = 3 the last is 2"),
        ({"max_bytes": 9}, r"what is dealt has no caps of its own; cap the sources in `of`"),
        ({"of": [{"name": "a", "kind": "files", "path": "x"}]}, r"sources\.share-0\.of\.0\.path: unknown key; did"),
    ],
)
def test_a_share_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dealt(tmp_path, **changes)
