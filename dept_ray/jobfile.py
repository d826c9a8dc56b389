"""Job files: TOML in, a `Job` out, or every mistake in it explained.

Unknown keys (with the nearest name offered), wrong types and contradictions are refused before anything is spent,
always with the key, the value and the remedy. What the keys are and mean is told in `config`.
"""

import json
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dept_ray.config import Job
from dept_ray.errors import ConfigError, nearest
from dept_ray.messages import Change
from dept_ray.source_sections import DealtSource, FilesSource, HubSource, InstalledSource, Source

_SOURCES = ("sources", "of")
"""Keys that hold sources."""
_KINDS = {"hub": HubSource, "files": FilesSource, "installed": InstalledSource, "dealt": DealtSource}

Fill = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Of the values that a job file has, nested defaults for those that it leaves open."""


def load_job(path: str | Path, fill: Fill = lambda values: {}, /, **overrides: Any) -> Job:
    """Read a job file.

    Args:
        path: of the file.
        fill: gives nested values for the keys that are still open.
        overrides: replace what the file says, of a section only the keys that they name.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not describe a job.
    """
    path = Path(path)
    values = filled(overrides, read_toml(path, "job"))
    return parse_job({"name": path.stem, **filled(values, fill(values))}, where=str(path))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The values of a TOML file.

    Args:
        path: of the file.
        what: it describes, for the message.

    Raises:
        ConfigError: it is missing, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.toml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"{what} file {path} does not exist{near}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ConfigError(f"{what} file {path} is not readable TOML: {err}") from None


def filled(values: Mapping[str, Any], fill: Mapping[str, Any]) -> dict[str, Any]:
    """Values, with those of `fill` where they have none."""
    found = {**fill, **values}
    for key in values.keys() & fill.keys():
        if isinstance(values[key], dict) and isinstance(fill[key], Mapping):
            found[key] = filled(values[key], fill[key])
    return found


def load_source(path: str | Path) -> Change:
    """The change that adds the source which a TOML file describes (the keys of one [[sources]] table).

    Raises:
        ConfigError: the file is missing or is not TOML; whether it describes a source is checked against the run.
    """
    path = Path(path)
    values = read_toml(path, "source")
    tables = values.get("sources", [values])
    if len(tables) != 1:
        raise ConfigError(f"source file {path} has {len(tables)} [[sources]] tables: one at a time")
    return {"add": {"name": path.stem, **tables[0]}}


def parse_job(values: dict[str, Any], where: str = "job") -> Job:
    """A `Job` from plain values, folders and local file patterns made absolute.

    Raises:
        ConfigError: one line per mistake, each with key, value and remedy.
    """
    try:
        # As JSON, because only there does strictness let a list be a tuple: 8 is no "8", and 8.0 no 8.
        job = Job.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as err:
        lines = [_explain(error, values) for error in err.errors()]
        count = f"{len(lines)} mistake{'s' * (len(lines) > 1)}"
        raise ConfigError("\n".join([f"{where}: {count}", *(f"  {line}" for line in lines)])) from None
    for key, folder in [("folder", job.folder), *((f"sources.{s.name}.storage", s.storage) for s in job.sources)]:
        if folder is not None and "://" in folder:
            raise ConfigError(
                f"{where}: {key} = {folder!r} must be a folder (mount the bucket, or choose a local disk)"
            )
    changes: dict[str, Any] = {"folder": _absolute(job.folder), "sources": tuple(map(_placed, job.sources))}
    if job.regions.mailbox is not None:
        changes["regions"] = job.regions.model_copy(update={"mailbox": _absolute(job.regions.mailbox)})
    if job.tokenizer.kind == "file" and job.tokenizer.name:
        changes["tokenizer"] = job.tokenizer.model_copy(update={"name": _absolute(job.tokenizer.name)})
    return job.model_copy(update=changes)


def _placed(source: Source) -> Source:
    """A source with absolute paths."""
    changes: dict[str, Any] = {}
    if source.storage is not None:
        changes["storage"] = _absolute(source.storage)
    if isinstance(source, FilesSource):
        changes["paths"] = tuple(map(_absolute, source.paths))
        changes["validation_paths"] = tuple(map(_absolute, source.validation_paths))
    if isinstance(source, DealtSource):
        changes["of"] = tuple(map(_placed, source.of))
    return source.model_copy(update=changes)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _explain(error: Any, values: dict[str, Any]) -> str:
    """One mistake as `key = value: what is wrong; what to do`."""
    loc = error["loc"]
    # pydantic puts the kind of a source between its number and its key
    loc = tuple(p for i, p in enumerate(loc) if not (i > 1 and isinstance(loc[i - 1], int) and loc[i - 2] in _SOURCES))
    key = ".".join(_named(loc, values))
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(loc[-1]), _fields_at(loc[:-1], values))}"
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "union_tag_not_found":
        return f'{key}.kind: missing; add "hub", "files" or "installed"'
    if kind == "union_tag_invalid":
        return f'{key}.kind = {given["kind"]!r}: must be "hub", "files" or "installed"'
    if kind == "string_pattern_mismatch":
        return f"{key} = {given!r}: must be letters, digits and . _ - only, and begin with a letter or a digit"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} = {given!r}: must be a table"
    if kind == "tuple_type":
        return f"{key} = {given!r}: must be a list"
    return f"{key} = {given!r}: {error['msg'].replace('Input should', 'must')}"


def _named(loc: tuple[Any, ...], values: Any) -> list[str]:
    """The parts of a key; a source goes by its name rather than by its number, if it has one."""
    parts = [str(part) for part in loc]
    if loc[:1] == ("sources",) and len(loc) > 1:
        source = values["sources"][loc[1]]
        name = source.get("name") if isinstance(source, dict) else None
        parts[1] = name if isinstance(name, str) and name else f"{loc[1]}"
    return parts


def _fields_at(loc: tuple[Any, ...], values: Any) -> list[str]:
    """Field names of the section that `loc` points to."""
    section: Any = Job
    for part in loc:
        values = values[part]
        if part in _SOURCES:
            continue
        if isinstance(part, int):
            section = _KINDS[values["kind"]]
        else:
            annotation = section.model_fields[part].annotation
            options = [annotation, *typing.get_args(annotation)]
            section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
