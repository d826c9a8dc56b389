"""Truths about a source's documents: where they stand, how often, how many, and what is said when they fail."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dept_ray.errors import SourceError
from dept_ray.source_sections import FilesSource, HubSource, InstalledSource
from dept_ray.text import sources
from dept_ray.text.sources import documents, raw_documents

TEXTS = [f"Document {i}: " + "wörter " * (i % 7 + 1) for i in range(60)]


def files(*paths: Path | str, **fields: Any) -> FilesSource:
    return FilesSource(kind="files", name="de", paths=tuple(map(str, paths)), **fields)


def hub(dataset: Path | str, **fields: Any) -> HubSource:
    return HubSource(kind="hub", name="de", dataset=str(dataset), **fields)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7)
    return path


def compress(path: Path, suffix: str) -> Path:
    data = path.read_bytes()
    packed = gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)
    path.with_name(path.name + suffix).write_bytes(packed)
    return path.with_name(path.name + suffix)


def sides(source: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for side, text in documents(source):
        found[side].append(text)
    return found


def refused(source: Any) -> str:
    """The message of a source that is refused before it yields anything."""
    with pytest.raises(SourceError) as caught:
        next(documents(source))
    assert 'source "de"' in str(caught.value)
    return str(caught.value)


def test_jsonl_gz_and_zst_and_parquet_and_txt_give_the_same_documents(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt").write_text(text)
        compress(tmp_path / f"{i:03}.txt", ".zst")
    plain = [write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)]
    packed = [compress(path, suffix) for path in plain for suffix in (".gz", ".zst")]
    for path in [*plain, *packed, tmp_path / "*.txt", tmp_path / "*.txt.zst"]:
        assert list(raw_documents(files(path), "train")) == TEXTS, path


def test_a_gz_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert list(raw_documents(files(tmp_path / "a.jsonl.gz"), "train")) == TEXTS


def test_text_columns_of_every_string_type_are_read(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert list(raw_documents(files(tmp_path / "a.parquet"), "train")) == ["a", "", "b"]


def test_files_come_in_the_order_of_their_paths_and_once(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    patterns = [tmp_path / "c.txt", tmp_path / "*.txt", tmp_path / "[ab].txt"]
    assert list(raw_documents(files(*patterns), "train")) == ["a", "b", "c"]


def test_a_uri_lists_as_a_local_glob_does(tmp_path: Path) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in ("*.txt", "*/*.txt", "**/*.txt", "x/**/*.txt", "x/[a-b].txt", "x/b.txt", "?.txt", "x/*/*.t?t"):
        local = list(raw_documents(files(tmp_path / pattern), "train"))
        assert local
        assert list(raw_documents(files(f"file://{tmp_path}/{pattern}"), "train")) == local, pattern


def test_a_document_never_stands_on_both_sides_or_twice(tmp_path: Path) -> None:
    twice = write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[::-1])
    found = sides(files(twice, validation_share=0.3))
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert found["validation"]


def test_the_side_of_a_document_does_not_depend_on_the_others(tmp_path: Path) -> None:
    forward = sides(files(write_jsonl(tmp_path / "a.jsonl", TEXTS), validation_share=0.3))
    backward = sides(files(write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1]), validation_share=0.3))
    assert forward == {side: texts[::-1] for side, texts in backward.items()}


def test_named_validation_files_are_the_validation_side_and_are_not_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [TEXTS[3], "only here"])
    source = files(tmp_path / "*.jsonl", validation_paths=(str(held_out),))
    assert list(raw_documents(source, "validation")) == [TEXTS[3], "only here"]
    found = sides(source)
    assert found["validation"] == [TEXTS[3], "only here"]
    assert found["train"] == TEXTS[:3] + TEXTS[4:]


def test_documents_are_cleaned_and_otherwise_kept(tmp_path: Path) -> None:
    decomposed = "u\u0308ber"
    write_jsonl(tmp_path / "a.jsonl", ["a\r\nb\0c\n ", " \n", "", "a\nbc\n ", decomposed, "x\ud800y"])
    found = sides(files(tmp_path / "a.jsonl", validation_share=0))
    assert found == {"train": ["a\nbc\n ", decomposed, "x\ufffdy"], "validation": []}


@pytest.mark.parametrize("cap", [1, 2, 3, 100, 1000])
def test_a_cap_is_kept_to_the_byte_and_never_splits_a_character(tmp_path: Path, cap: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["aüüü", *TEXTS])
    train = sides(files(path, validation_share=0, max_bytes=cap))["train"]
    size = len("".join(train).encode())
    assert cap - 1 <= size <= cap
    assert "".join(["aüüü", *TEXTS]).startswith("".join(train))


def test_both_caps_are_filled_when_both_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    found = sides(files(path, validation_share=0.3, max_bytes=50, max_validation_bytes=200))
    assert 49 <= len("".join(found["train"]).encode()) <= 50
    assert 199 <= len("".join(found["validation"]).encode()) <= 200


def test_reading_stops_at_the_cap(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text("broken")
    assert sides(files(tmp_path / "*.jsonl", validation_share=0.3, max_bytes=900))["train"]
    with pytest.raises(SourceError, match=r"b\.jsonl"):
        sides(files(tmp_path / "*.jsonl", validation_share=0.3))


def test_an_installed_source_is_capped_and_split() -> None:
    source = InstalledSource(
        kind="installed", name="maths", collection="maths", max_bytes=100_000, max_validation_bytes=9_000
    )
    found = sides(source)
    assert len("".join(found["train"])) == 100_000
    assert len("".join(found["validation"])) == 9_000
    assert list(raw_documents(source, "validation")) == []


def test_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for pattern in (str(tmp_path / "*.jsonl"), f"file://{tmp_path}/*.jsonl", f"file://{tmp_path}/none/a.txt"):
        message = refused(files(tmp_path / "a.txt", pattern))
        assert f"no file matches paths {pattern!r}; correct the pattern" in message
    assert "validation_paths" in refused(files(tmp_path / "a.txt", validation_paths=("none.txt",)))
    assert "name the files in it, as in /**/*.parquet" in refused(files(tmp_path))


def test_an_address_that_cannot_be_listed_is_named() -> None:
    assert "paths 'ftp://x/*.txt' cannot be listed" in refused(files("ftp://x/*.txt"))


def test_training_files_that_are_all_held_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    message = refused(files(tmp_path / "*.txt", validation_paths=(str(tmp_path / "a.txt"),)))
    assert "names no file that validation_paths does not name too; name others" in message


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.csv.gz", "a.jsonl.bz2"])
def test_an_unknown_suffix_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a")
    message = refused(files(tmp_path / name))
    assert f"{tmp_path / name}: its suffix is not known; name files that end in .parquet, .jsonl or .txt" in message


def test_an_absent_column_is_named_beside_those_that_exist(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)):
        message = refused(files(path, column="content"))
        assert str(path) in message
        assert 'no column "content"; set column to one of id, text' in message


def test_a_column_that_holds_no_text_is_named(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)):
        message = refused(files(path, column="id"))
        assert str(path) in message
        assert 'column "id" holds int' in message
        assert "set column to one that holds text" in message


def test_the_wrong_column_of_any_format_is_found_before_the_first_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "b.parquet")
    assert 'no column "text"' in refused(files(tmp_path / "*"))


def test_a_byte_that_is_not_utf8_is_located(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    message = refused(files(tmp_path / "a.txt"))
    assert f"{tmp_path / 'a.txt'}, byte 3: not UTF-8 (0xff); convert the file to UTF-8" in message
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl, byte 24: not UTF-8"):
        sides(files(tmp_path / "a.jsonl"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet, rows 0 to 0: not UTF-8" in refused(files(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("line", "wrong"), [('{"text": ', "not JSON"), ("[1]", "not a JSON object")])
def test_a_broken_line_is_located(tmp_path: Path, line: str, wrong: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(SourceError, match=rf"a\.jsonl, line 3: {wrong}.*; .*line"):
        sides(files(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for suffix in (".gz", ".zst"):
        compress(tmp_path / "a.jsonl", suffix)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match=rf"{name}: cannot be read, .*; mend or remove the file"):
        sides(files(path))


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    message = refused(files(path))
    assert "no training text in it; check paths" in message
    assert "column = 'text'" in message


def test_a_source_whose_validation_is_empty_is_refused_only_if_it_wants_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(SourceError, match=r'"de": no validation text in it; validation_share = 0.01 does') as one:
        sides(files(path, validation_share=0.01))
    remedy = "name validation_paths, set validation_share = 0 to train without any, or give it more documents"
    assert str(one.value).endswith(f"does not hold out a part of its one document: {remedy}")
    several = write_jsonl(tmp_path / "c.jsonl", ["one", "two"])
    with pytest.raises(SourceError, match=rf"hold out one of its 2 documents: raise it, {remedy}"):
        sides(files(several, validation_share=1e-9))
    with pytest.raises(SourceError, match=r"more documents \(raise max_bytes\)"):
        sides(files(several, validation_share=1e-9, max_bytes=3))
    assert sides(files(path, validation_share=0))["train"] == ["one"]
    empty = write_jsonl(tmp_path / "b.jsonl", [""])
    with pytest.raises(SourceError, match="no validation text in it; name files"):
        sides(files(path, validation_paths=(str(empty),)))


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(60))})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "held": datasets.Dataset.from_dict({"text": ["v"]})}).save_to_disk(
        tmp_path / "two"
    )
    assert list(raw_documents(hub(tmp_path / "one"), "train")) == TEXTS
    found = sides(hub(tmp_path / "two", validation_split="held"))
    assert found == {"train": TEXTS, "validation": ["v"]}

    assert 'no column "body"; set column to one of text, id' in refused(hub(tmp_path / "one", column="body"))
    assert 'column "id" holds int, not strings' in refused(hub(tmp_path / "one", column="id"))
    assert "set it to one of train, held" in refused(hub(tmp_path / "two", split="test"))
    assert "leave validation_split out" in refused(hub(tmp_path / "one", validation_split="held"))


def test_a_folder_of_plain_files_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", TEXTS)
    assert list(raw_documents(hub(tmp_path / "data"), "train")) == TEXTS
    assert 'no column "body"; set column to one of id, text' in refused(hub(tmp_path / "data", column="body"))
    assert "split 'test': loading failed, ValueError" in refused(hub(tmp_path / "data", split="test"))
    message = refused(hub(tmp_path / "nowhere"))
    assert f"dataset '{tmp_path / 'nowhere'}'" in message
    assert "check dataset, config and split" in message


def test_a_connection_that_breaks_while_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        features = None

        def __iter__(self) -> Any:
            yield {"text": "first"}
            raise ConnectionError("no route")

    monkeypatch.setattr(sources, "_open_hub", lambda *_: Broken())
    found = raw_documents(hub("some/where"), "train")
    assert list(islice(found, 1)) == ["first"]
    with pytest.raises(SourceError, match="reading failed, ConnectionError: no route; check dataset"):
        next(found)


def test_a_source_error_crosses_processes(tmp_path: Path) -> None:
    import pickle

    with pytest.raises(SourceError) as caught:
        next(documents(files(tmp_path / "none.txt")))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
