"""What a model is fine-tuned on: SST-2, MNLI, STS-B and RACE, each a row of facts, and their examples.

Examples come from the Hub, or from local files of the same columns and classes (parquet or jsonl): anybody's task of
one of these schemas will do. Nothing is tokenised here, and nothing is trained (`study.downstream`).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dept_ray.errors import ConfigError, SourceError, nearest

Goal = Literal["class", "number", "choice"]


@dataclass(frozen=True)
class Task:
    """One task's facts."""

    what: str
    dataset: str
    """On the Hub, with its `config`."""
    config: str
    goal: Goal
    """class: one of several, for the text. number: how much, for the text. choice: one of the texts' endings."""
    texts: tuple[str, ...]
    """Columns that are read one after the other."""
    label: str
    """Column of the answer: a class from 0, a number, or for a choice its place from 0 or its letter from A."""
    options: str | None = None
    """Column of the endings, a list."""
    validation: str = "validation"
    """Split to measure on; `train` is trained on."""
    classes: int = 0
    """How many there are, from 0; 0: the answer is no class."""


_GLUE = "nyu-mll/glue"
TASKS = {
    "sst2": Task("sentence classification", _GLUE, "sst2", "class", ("sentence",), "label", classes=2),
    "mnli": Task("pair classification", _GLUE, "mnli", "class", ("premise", "hypothesis"), "label",
                 validation="validation_matched", classes=3),
    "stsb": Task("similarity", _GLUE, "stsb", "number", ("sentence1", "sentence2"), "label"),
    "race": Task("multiple choice", "ehovy/race", "all", "choice", ("article", "question"), "answer", "options"),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    sequences: tuple[tuple[str, ...], ...]
    """What the model reads, each in parts: one sequence or, of a choice, one for each ending."""
    label: float


def task_named(name: str) -> Task:
    """A row of `TASKS`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        raise ConfigError(f'no task "{name}"{nearest(name, list(TASKS))}')
    return TASKS[name]


def load_examples(task: Task, split: str, file: str | None = None, most: int | None = None) -> list[Example]:
    """The examples of a split.

    Args:
        task: what the columns are called and mean.
        split: of the Hub's dataset.
        file: parquet or jsonl to read instead.
        most: of the first rows; None: all.

    Raises:
        SourceError: it cannot be read, is empty, lacks a column, or a row is not what the task says.
    """
    where = file or f"dataset {task.dataset!r}, config {task.config!r}, split {split!r}"
    rows = _of_file(Path(file)) if file else _of_hub(task, split, where)
    examples = []
    for number, row in enumerate(rows, start=1):
        if most is not None and len(examples) == most:
            break
        examples.append(_example(task, row, f"{where}, row {number}"))
    if not examples:
        raise SourceError(f"{where}: no examples in it; name another file or split")
    endings = {len(example.sequences) for example in examples}
    if len(endings) > 1:
        raise SourceError(f"{where}: rows of {min(endings)} and of {max(endings)} {task.options}; all need as many")
    return examples


def _example(task: Task, row: dict[str, Any], where: str) -> Example:
    for column in (*task.texts, task.label, *([task.options] if task.options else [])):
        if column not in row:
            raise SourceError(f'{where}: no column "{column}"; it has {", ".join(row) or "none"}')
    texts = tuple(row[column] for column in task.texts)
    options = row[task.options] if task.options else [None]
    if not isinstance(options, list) or len(options) < 1 + (task.options is not None):
        raise SourceError(f"{where}: {task.options} = {options!r} is no list of two texts or more; mend the row")
    sequences = tuple(texts if option is None else (*texts, option) for option in options)
    for text in (text for sequence in sequences for text in sequence):
        if not isinstance(text, str):
            raise SourceError(f"{where}: {text!r} is no text; mend the row, or leave it out")
    places = task.classes or len(options)
    return Example(sequences, _LABELS[task.goal](row[task.label], places, f"{where}: {task.label}"))


def _class(value: Any, classes: int, where: str) -> float:
    if not isinstance(value, int) or not 0 <= value < classes:
        known = ", ".join(map(str, range(classes)))
        raise SourceError(
            f"{where} = {value!r} is no class of the task (known: {known}; tests without answers have -1): "
            "mend the row, or leave it out"
        )
    return value


def _number(value: Any, options: int, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise SourceError(f"{where} = {value!r} must be a number; mend the row, or leave it out")
    return float(value)


def _choice(value: Any, options: int, where: str) -> float:
    place = ord(value) - ord("A") if isinstance(value, str) and len(value) == 1 else value
    if not isinstance(place, int) or not 0 <= place < options:
        last = chr(ord("A") + options - 1)
        raise SourceError(f"{where} = {value!r} must be a letter from A to {last}, or a place from 0 to {options - 1}")
    return place


_LABELS: dict[Goal, Callable[[Any, int, str], float]] = {"class": _class, "number": _number, "choice": _choice}


# ------------------------------------------------------------------------------------------------ where rows come from
def _of_file(file: Path) -> Iterable[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_table(file).to_pylist()
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no JSON object")
            return rows
    except (OSError, ValueError, pa.ArrowException) as err:
        raise SourceError(f"{file} cannot be read ({err}): mend the file, or name another") from None
    raise SourceError(f"{file}: its suffix is not known; name a file that ends in .parquet or .jsonl")


def _of_hub(task: Task, split: str, where: str) -> Sequence[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(task.dataset, task.config, split=split)  # pyright: ignore[reportReturnType]
    except Exception as err:  # noqa: BLE001 - a split, the network and a login that fail have no common parent
        why = " ".join(f"{type(err).__name__}: {err}".split())
        raise SourceError(
            f"{where} cannot be had from the Hub ({why}): check the network, or name files of its columns with "
            "--train and --validation"
        ) from None
