"""From a source in a job file to its documents: read, cleaned, split, de-duplicated and capped.

Raw text comes from a Hub dataset, from files (parquet, jsonl, txt; local or in a bucket) or from what is installed on
this machine. It is streamed: no file but a txt or a compressed parquet is ever whole in memory, and what is not needed
is not read. This module does not normalise Unicode, does not filter by quality, and does not tokenize.

The one idea: which side a document stands on is decided by the document alone. Its hash says so, or the source names
what to validate on; either way the same text never stands on both sides, in whatever order the files come.
"""

import fnmatch
import glob
import hashlib
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dept_ray.config import FilesSource, HubSource, InstalledSource
from dept_ray.errors import SourceError
from dept_ray.text.installed import installed_documents

Side = Literal["train", "validation"]
AnySource = HubSource | FilesSource | InstalledSource


def documents(source: AnySource) -> Iterator[tuple[Side, str]]:
    """The documents of a source, each with its side, in one deterministic order.

    Kept as they are but for line ends (CR LF to LF), NUL characters (left out) and lone surrogates (replaced, for they
    have no UTF-8). Empty documents and exact repetitions are left out. The last document of a capped side is cut at the
    cap. Where the source names its validation text, that is read first.

    Raises:
        SourceError: the source cannot be read, or a side that should hold text holds none.
    """
    named = _names_validation(source)
    # Both are opened, and so checked, before either is read.
    streams: list[tuple[Side, Iterator[str]]] = [("train", raw_documents(source, "train"))]
    if named:
        streams.insert(0, ("validation", raw_documents(source, "validation")))
    room: dict[Side, float] = {
        "train": source.max_bytes or float("inf"),
        "validation": source.max_validation_bytes or float("inf"),
    }
    seen: set[bytes] = set()
    found: set[Side] = set()
    for stream_side, stream in streams:
        # Reading stops when these are full. Held-out text without a cap is never waited for: it is what came by.
        filling: list[Side] = [stream_side]
        if not named and source.validation_share > 0 and source.max_validation_bytes:
            filling.append("validation")
        for raw in stream:
            text = _clean(raw)
            data = text.encode()
            key = hashlib.blake2b(data, digest_size=16).digest()
            side: Side = stream_side if named else _side_of(key, source.validation_share)
            if not text.strip() or key in seen or room[side] <= 0:
                continue
            seen.add(key)
            if len(data) > room[side]:
                text = data[: int(room[side])].decode("utf-8", "ignore")  # without the half of a character
            room[side] -= len(data)
            if text.strip():
                found.add(side)
                yield side, text
            if all(room[each] <= 0 for each in filling):
                break

    if "train" not in found:
        raise SourceError(f"{_label(source)}: no training text in it; check {_key_of_text(source)}")
    if (named or source.validation_share > 0) and "validation" not in found:
        remedy = (
            "name files or a split that hold text"
            if named
            else f"raise validation_share = {source.validation_share} or max_bytes, or name validation files"
        )
        raise SourceError(f"{_label(source)}: no validation text in it; {remedy}")


def raw_documents(source: AnySource, split: Side) -> Iterator[str]:
    """The raw text of what a source names for one side; nothing for "validation" where it names none.

    What can be checked without reading all is checked here, before the first document is asked for.

    Raises:
        SourceError: the source cannot be read.
    """
    if split == "validation" and not _names_validation(source):
        return iter(())
    if isinstance(source, FilesSource):
        return _files(source, split)
    if isinstance(source, HubSource):
        return _hub(source, (source.validation_split or "") if split == "validation" else source.split)
    return installed_documents(source.collection)


def _names_validation(source: AnySource) -> bool:
    if isinstance(source, FilesSource):
        return bool(source.validation_paths)
    return isinstance(source, HubSource) and source.validation_split is not None


def _side_of(key: bytes, validation_share: float) -> Side:
    return "validation" if int.from_bytes(key[:8], "big") / 2**64 < validation_share else "train"


def _clean(raw: str) -> str:
    text = raw.replace("\r\n", "\n").replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _label(source: AnySource) -> str:
    return f'source "{source.name}"'


def _key_of_text(source: AnySource) -> str:
    if isinstance(source, FilesSource):
        return f"paths = {list(source.paths)} and column = {source.column!r}"
    if isinstance(source, HubSource):
        return f"dataset = {source.dataset!r} and column = {source.column!r}"
    return f"collection = {source.collection!r}, or use another one"


# Files.


class _File:
    """One file of a source: where it is, and how messages name it."""

    def __init__(self, filesystem: Any, path: str, uri: str, source: FilesSource):
        self.filesystem, self.path, self.uri, self.column = filesystem, path, uri, source.column
        self.label = f"{_label(source)}, file {uri}"
        suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
        self.compression = {".gz": "gzip", ".zst": "zstd"}.get(suffixes[-1]) if suffixes else None
        self.format = (suffixes[:-1] if self.compression else suffixes)[-1:]
        if self.format not in ([".parquet"], [".jsonl"], [".txt"]):
            raise SourceError(
                f"{self.label}: its suffix is not known; name files that end in .parquet, .jsonl or .txt "
                "(each also with .gz or .zst)"
            )

    def stream(self) -> io.BufferedReader:
        return io.BufferedReader(self.filesystem.open_input_stream(self.path, compression=self.compression), 1 << 20)

    def documents(self) -> Iterator[str]:
        """Its texts.

        Raises:
            SourceError: it is damaged, or is not what its suffix says.
        """
        import pyarrow as pa

        read = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}[self.format[0]]
        try:
            yield from read(self)
        except (pa.ArrowException, OSError) as err:
            raise SourceError(f"{self.label}: cannot be read, {err}; mend or remove the file") from err


def _files(source: FilesSource, split: Side) -> Iterator[str]:
    validation = _resolve(source, "validation_paths")
    files = _resolve(source, "paths") if split == "train" else validation
    # "data/*.jsonl" may match the validation file as well: what is named for validation is never trained on.
    kept = [file for uri, file in sorted(files.items()) if split == "validation" or uri not in validation]
    if not kept:
        found = f"paths = {list(source.paths)} names no file that validation_paths does not name too"
        raise SourceError(f"{_label(source)}: {found}; name others")
    for file in {file.format[0]: file for file in reversed(kept)}.values():
        next(file.documents(), None)  # the first file of each format shows a wrong column at once
    return chain.from_iterable(file.documents() for file in kept)


def _resolve(source: FilesSource, key: Literal["paths", "validation_paths"]) -> dict[str, _File]:
    """The files that the globs of one key match, by URI."""
    from pyarrow import ArrowException
    from pyarrow.fs import LocalFileSystem

    found: dict[str, _File] = {}
    for pattern in getattr(source, key):
        try:
            if "://" in pattern:
                matched = _list_remote(pattern)
            else:
                names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
                matched = [(LocalFileSystem(), name, name) for name in names if Path(name).is_file()]
        except (ArrowException, OSError) as err:
            raise SourceError(
                f"{_label(source)}: {key} {pattern!r} cannot be listed, {err}; check the address and the credentials"
            ) from err
        if not matched:
            remedy = "name the files in it, as in /**/*.parquet" if Path(pattern).is_dir() else "correct the pattern"
            raise SourceError(f"{_label(source)}: no file matches {key} {pattern!r}; {remedy}")
        found.update({uri: _File(filesystem, path, uri, source) for filesystem, path, uri in matched})
    return found


def _list_remote(pattern: str) -> list[tuple[Any, str, str]]:
    """(filesystem, path, URI) of the files in a bucket that match.

    Options of pyarrow's may follow the pattern, as in s3://bucket/*.jsonl?region=eu-west-1.
    """
    from pyarrow.fs import FileSelector, FileSystem, FileType

    found_options = re.search(r"\?\w+=[^/]*$", pattern)
    options = found_options.group() if found_options else ""
    place = pattern.removesuffix(options)
    steps = place.split("/")
    fixed = next((i for i, step in enumerate(steps) if re.search(r"[*?[]", step)), len(steps) - 1)
    prefix, wild = "/".join(steps[:fixed]), steps[fixed:]
    filesystem, folder = FileSystem.from_uri(prefix + options)
    if re.search(r"[*?[]", wild[0]):
        deep = len(wild) > 1 or wild[0] == "**"
        infos = filesystem.get_file_info(FileSelector(folder, allow_not_found=True, recursive=deep))
    else:
        infos = [filesystem.get_file_info(f"{folder}/{wild[0]}")]
    found = []
    for info in infos:
        inside = info.path[len(folder) :].lstrip("/")
        if info.type == FileType.File and _matches(inside.split("/"), wild):
            found.append((filesystem, info.path, f"{prefix}/{inside}"))
    return found


def _matches(path: list[str], pattern: list[str]) -> bool:
    """As `glob`: a * stays within its folder, a ** spans any number of them."""
    if not path or not pattern:
        return not path and all(step == "**" for step in pattern)
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or _matches(path[1:], pattern)
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _read_txt(file: _File) -> Iterator[str]:
    with file.stream() as stream:
        yield _decode(stream.read(), 0, file)


def _read_jsonl(file: _File) -> Iterator[str]:
    with file.stream() as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            text = _decode(line, offset, file)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as err:
                raise SourceError(f"{file.label}, line {number}: not JSON, {err}; mend or remove the line") from err
            if not isinstance(record, dict):
                raise SourceError(f"{file.label}, line {number}: not a JSON object; write one object per line")
            if file.column not in record:
                raise SourceError(_no_column(f"{file.label}, line {number}", file.column, list(record)))
            value = record[file.column]
            if value is not None and not isinstance(value, str):
                raise SourceError(_no_string(f"{file.label}, line {number}", file.column, type(value).__name__))
            yield value or ""


def _read_parquet(file: _File) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The footer stands at the end, so a parquet that is compressed as a whole must be read as a whole.
    if file.compression:
        with file.stream() as stream:
            opened = pa.BufferReader(stream.read())
    else:
        opened = file.filesystem.open_input_file(file.path)
    with opened, pq.ParquetFile(opened) as table:
        schema = table.schema_arrow
        if file.column not in schema.names:
            raise SourceError(_no_column(file.label, file.column, schema.names))
        kind = schema.field(file.column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise SourceError(_no_string(file.label, file.column, str(kind)))
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[file.column]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError as err:
                where = f"{file.label}, rows {row} to {row + len(batch) - 1}"
                raise SourceError(f"{where}: not UTF-8, {err.reason}; convert the file to UTF-8") from err
            row += len(batch)
            yield from (value or "" for value in values)


def _decode(data: bytes, offset: int, file: _File) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        where = f"{file.label}, byte {offset + err.start}"
        raise SourceError(f"{where}: not UTF-8 (0x{data[err.start]:02x}); convert the file to UTF-8") from err


def _no_column(where: str, column: str, names: list[str]) -> str:
    return f'{where}: no column "{column}"; set column to one of {", ".join(names) or "(there are none)"}'


def _no_string(where: str, column: str, kind: str) -> str:
    return f'{where}: column "{column}" holds {kind}, not strings; set column to one that holds text'


# The Hub.


def _hub(source: HubSource, split: str) -> Iterator[str]:
    from datasets.exceptions import DatasetsError

    where = f"{_label(source)}, dataset {source.dataset!r}, split {split!r}"
    # datasets has no one class for what can go wrong: a missing split is a ValueError, a loading script a RuntimeError.
    failures = (DatasetsError, OSError, ValueError, RuntimeError)

    def failed(doing: str, err: Exception) -> SourceError:
        return SourceError(
            f"{where}: {doing} failed, {type(err).__name__}: {' '.join(str(err).split())}; "
            "check dataset, config and split, the network, and that you may read it (hf auth login)"
        )

    def texts(rows: Any) -> Iterator[str]:
        rows = iter(rows)
        while True:
            try:
                row = next(rows, None)
            except failures as err:
                raise failed("reading", err) from err
            if row is None:
                return
            if source.column not in row:
                raise SourceError(_no_column(where, source.column, list(row)))
            value = row[source.column]
            if value is not None and not isinstance(value, str):
                raise SourceError(_no_string(where, source.column, type(value).__name__))
            yield value or ""

    try:
        rows = _open_hub(source, split, where)
    except failures as err:
        raise failed("loading", err) from err
    if rows.features is not None:  # what is streamed from plain files tells its columns with the first row only
        if source.column not in rows.features:
            raise SourceError(_no_column(where, source.column, list(rows.features)))
        rows = rows.select_columns([source.column])  # so that the others are not decoded
    found = texts(rows)
    first = next(found, None)  # shows at once a column that holds no text
    return iter(()) if first is None else chain([first], found)


def _open_hub(source: HubSource, split: str, where: str) -> Any:
    import datasets

    folder = Path(source.dataset)
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(source.dataset)
        if split not in saved:
            raise SourceError(f"{where}: no such split in the folder; set it to one of {', '.join(map(str, saved))}")
        return saved[split]
    if (folder / "dataset_info.json").is_file():
        if split == source.validation_split:
            raise SourceError(f"{where}: the folder holds a single split; leave validation_split out")
        return datasets.load_from_disk(source.dataset)
    return datasets.load_dataset(source.dataset, source.config, split=split, streaming=True)
