"""From a source in a job file to its documents: read, cleaned, split, de-duplicated and capped.

Raw text comes from a Hub dataset, from files (parquet, jsonl, txt; local or in a bucket) or from what is installed on
this machine. It is streamed: no file but a txt or a compressed parquet is ever whole in memory, and what is not needed
is not read. This module does not normalise Unicode, does not filter by quality, and does not tokenize.

The one idea: which side a document stands on is decided by the document alone. Its hash says so, or the source names
what to validate on; either way the same text never stands on both sides, in whatever order the files come.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dept_ray.errors import SourceError
from dept_ray.source_sections import DealtSource, FilesSource, HubSource, ReadSource, Source
from dept_ray.text.files import Side, file_documents, no_column, no_string
from dept_ray.text.installed import installed_documents


def documents(source: Source) -> Iterator[tuple[Side, str]]:
    """The documents of a source, each with its side, in one deterministic order.

    Kept as they are but for line ends (CR LF to LF), NUL characters (left out) and lone surrogates (replaced, for they
    have no UTF-8). Empty documents and exact repetitions are left out. The last document of a capped side is cut at the
    cap. Where the source names its validation text, that is read first.

    Raises:
        SourceError: the source cannot be read, or a side that should hold text holds none.
    """
    return _dealt(source) if isinstance(source, DealtSource) else _read(source)


def _dealt(source: DealtSource) -> Iterator[tuple[Side, str]]:
    """The documents of all its sources that fall to its share; by other bytes of the hash than those of the side."""
    for each in source.of:
        for side, text in _read(each):
            if int.from_bytes(_key(text.encode())[8:], "big") % source.shares == source.share:
                yield side, text


def _read(source: ReadSource) -> Iterator[tuple[Side, str]]:
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
            key = _key(data)
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
        remedy = "name files or a split that hold text" if named else _without_validation(source, len(seen))
        raise SourceError(f"{_label(source)}: no validation text in it; {remedy}")


def raw_documents(source: ReadSource, split: Side) -> Iterator[str]:
    """The raw text of what a source names for one side; nothing for "validation" where it names none.

    What can be checked without reading all is checked here, before the first document is asked for.

    Raises:
        SourceError: the source cannot be read.
    """
    if split == "validation" and not _names_validation(source):
        return iter(())
    if isinstance(source, FilesSource):
        return file_documents(source, split)
    if isinstance(source, HubSource):
        return _hub(source, (source.validation_split or "") if split == "validation" else source.split)
    return installed_documents(source.collection)


def _names_validation(source: ReadSource) -> bool:
    if isinstance(source, FilesSource):
        return bool(source.validation_paths)
    return isinstance(source, HubSource) and source.validation_split is not None


def _key(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _side_of(key: bytes, validation_share: float) -> Side:
    return "validation" if int.from_bytes(key[:8], "big") / 2**64 < validation_share else "train"


def _clean(raw: str) -> str:
    text = raw.replace("\r\n", "\n").replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _label(source: ReadSource) -> str:
    return f'source "{source.name}"'


def _without_validation(source: ReadSource, count: int) -> str:
    """Why a share of `count` documents is nothing, and what to do."""
    cut = "a part of its one document" if count == 1 else f"one of its {count:,} documents"
    why = f"validation_share = {source.validation_share} does not hold out {cut}"
    name = {FilesSource: "name validation_paths, ", HubSource: "name a validation_split, "}.get(type(source), "")
    more = "more documents (raise max_bytes)" if source.max_bytes else "more documents"
    raised = "raise it, " if count > 1 else ""
    return f"{why}: {raised}{name}set validation_share = 0 to train without any, or give it {more}"


def _key_of_text(source: ReadSource) -> str:
    if isinstance(source, FilesSource):
        return f"paths = {list(source.paths)} and column = {source.column!r}"
    if isinstance(source, HubSource):
        return f"dataset = {source.dataset!r} and column = {source.column!r}"
    return f"collection = {source.collection!r}, or use another one"


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
                raise SourceError(no_column(where, source.column, list(row)))
            value = row[source.column]
            if value is not None and not isinstance(value, str):
                raise SourceError(no_string(where, source.column, type(value).__name__))
            yield value or ""

    try:
        rows = _open_hub(source, split, where)
    except failures as err:
        raise failed("loading", err) from err
    if rows.features is not None:  # what is streamed from plain files tells its columns with the first row only
        if source.column not in rows.features:
            raise SourceError(no_column(where, source.column, list(rows.features)))
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
