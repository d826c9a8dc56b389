"""The documents of a `files` source: which files its globs name, and what each of their formats holds.

Parquet, jsonl and txt, each also .gz or .zst, on this machine or in a bucket. A file is checked when it is opened, and
read as a stream: none but a txt or a compressed parquet is ever whole in memory. Knows nothing of cleaning and
splitting (`sources`).

The one idea: a message about text names the file, and the line, row or byte in it.
"""

import fnmatch
import glob
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dept_ray.errors import SourceError
from dept_ray.source_sections import FilesSource

Side = Literal["train", "validation"]


def file_documents(source: FilesSource, split: Side) -> Iterator[str]:
    """The raw text of the files that are named for one side, in the order of their paths.

    Raises:
        SourceError: a pattern matches nothing, or a file cannot be read or does not hold text.
    """
    validation = _resolve(source, "validation_paths")
    files = _resolve(source, "paths") if split == "train" else validation
    # "data/*.jsonl" may match the validation file as well: what is named for validation is never trained on.
    kept = [file for uri, file in sorted(files.items()) if split == "validation" or uri not in validation]
    if not kept:
        found = f"paths = {list(source.paths)} names no file that validation_paths does not name too"
        raise SourceError(f'source "{source.name}": {found}; name others')
    for file in {file.format[0]: file for file in reversed(kept)}.values():
        next(file.documents(), None)  # the first file of each format shows a wrong column at once
    return chain.from_iterable(file.documents() for file in kept)


class _File:
    """One file of a source: where it is, and how messages name it."""

    def __init__(self, filesystem: Any, path: str, uri: str, source: FilesSource):
        self.filesystem, self.path, self.uri, self.column = filesystem, path, uri, source.column
        self.label = f'source "{source.name}", file {uri}'
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
            where = f'source "{source.name}": {key} {pattern!r}'
            raise SourceError(f"{where} cannot be listed, {err}; check the address and the credentials") from err
        if not matched:
            remedy = "name the files in it, as in /**/*.parquet" if Path(pattern).is_dir() else "correct the pattern"
            raise SourceError(f'source "{source.name}": no file matches {key} {pattern!r}; {remedy}')
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
                raise SourceError(no_column(f"{file.label}, line {number}", file.column, list(record)))
            value = record[file.column]
            if value is not None and not isinstance(value, str):
                raise SourceError(no_string(f"{file.label}, line {number}", file.column, type(value).__name__))
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
            raise SourceError(no_column(file.label, file.column, schema.names))
        kind = schema.field(file.column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise SourceError(no_string(file.label, file.column, str(kind)))
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


def no_column(where: str, column: str, names: list[str]) -> str:
    return f'{where}: no column "{column}"; set column to one of {", ".join(names) or "(there are none)"}'


def no_string(where: str, column: str, kind: str) -> str:
    return f'{where}: column "{column}" holds {kind}, not strings; set column to one that holds text'
