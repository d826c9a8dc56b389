"""A study in a file: one base job, and what varies around it; the schema of `jobs/study_*.toml`.

    name, folder, seeds      a study has one folder, so that its runs share prepared text
    [job]                    the base job: the keys of a job file, or the path of one
    [variants.NAME]          what differs from it in one row of the table, as keys of a job file
    [grid]                   values of a key that every variant is run with, each a row of its own
    [adaptations.NAME]       what is made of each body that was trained, as keys of a job file

Sources of the base job that are `held_out` are kept for the adaptations: no body is trained on them. Which runs follow
from it is told by `cells`.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dept_ray.errors import ConfigError, nearest
from dept_ray.jobfile import read_toml
from dept_ray.sections import Name, Section

Point = tuple[tuple[str, Any], ...]
"""Values of some keys, such as (("inner.lr", 0.003),)."""
Values = dict[str, tuple[Any, ...]]
"""By dotted key, such as {"inner.lr": (0.001, 0.003)}."""
FOLLOWS = ("name", "folder", "seed", "rounds.total")
"""Keys that no variant may set: they follow from the study."""


class Variant(Section):
    """`[variants.NAME]`: a row of the table."""

    job: dict[str, Any] = Field({})
    """Keys of a job file that differ from the base job's."""
    baseline: bool = False
    """Whether the others are held against it: against the best of all baselines."""
    match: Literal["tokens", "steps"] = "tokens"
    """To what of the base job `rounds.total` is made equal: tokens of all silos, or inner steps of one. They differ
    where all sources are mixed in one silo (METHOD.md section 4)."""
    dealt: bool = False
    """Deal the text of all sources at random over as many silos: the same data, identically distributed."""
    sweep: Values = Field({})
    """Values to be tried under the first seed; the best in distribution is taken, under all seeds."""


class Adaptation(Section):
    """`[adaptations.NAME]`: a table of its own."""

    job: dict[str, Any] = Field({})
    """Keys of a job file; what is left open is the paper's evaluation (`study.adapt`), of the base job's length."""


class Study(Section):
    """Runs to be compared."""

    name: Name
    folder: str = "."
    """Holds data/, runs/, silos/ and studies/; relative to where the command is run."""
    seeds: tuple[int, ...] = (0,)
    job: dict[str, Any]
    variants: dict[Name, Variant]
    grid: Values = Field({})
    adaptations: dict[Name, Adaptation] = Field({})

    @model_validator(mode="after")
    def _says_something(self) -> "Study":
        if not self.variants or not self.seeds:
            raise ValueError("a study needs one [variants.NAME] and one of seeds at least")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: one stands twice")
        for where, values in [
            ("grid", self.grid),
            *((f"variants.{n}.sweep", v.sweep) for n, v in self.variants.items()),
        ]:
            if empty := [key for key, tried in values.items() if not tried]:
                raise ValueError(f"{where}.{empty[0]} is empty: name its values, or leave the key out")
        for name, variant in self.variants.items():
            if wrong := [key for key in FOLLOWS if _has(variant.job, key) or key in {**self.grid, **variant.sweep}]:
                why = "it is matched to the base job's" if wrong[0] == "rounds.total" else "the study sets it"
                raise ValueError(f"variants.{name}: {wrong[0]} cannot vary, for {why}; leave it to [job]")
        return self


def load_study(path: str | Path, **overrides: Any) -> Study:
    """Read a study file.

    Args:
        path: of the file.
        overrides: replace its top-level keys.

    Raises:
        ConfigError: it, or the job file that it names, is missing, is not TOML, or does not describe a study.
    """
    path = Path(path)
    values = {"name": path.stem, **read_toml(path, "study"), **overrides}
    if isinstance(values.get("job"), str):
        values["job"] = read_toml(path.parent / values["job"], "job")
    try:
        study = Study.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as err:
        lines = "\n".join(f"  {_explain(error)}" for error in err.errors())
        raise ConfigError(f"study file {path}:\n{lines}") from None
    return study.model_copy(update={"folder": str(Path(study.folder).expanduser().absolute())})


def points(values: Mapping[str, tuple[Any, ...]]) -> Iterator[Point]:
    """All combinations of values; of no key, the one that sets nothing.

    >>> list(points({"inner.lr": (1, 2), "outer.momentum": (0.5,)}))
    [(('inner.lr', 1), ('outer.momentum', 0.5)), (('inner.lr', 2), ('outer.momentum', 0.5))]
    """
    return (tuple(zip(values, each, strict=True)) for each in itertools.product(*values.values()))


def nested(point: Point) -> dict[str, Any]:
    """As keys of a job file.

    >>> nested((("inner.lr", 1), ("inner.clip", 2), ("seed", 3)))
    {'inner': {'lr': 1, 'clip': 2}, 'seed': 3}
    """
    found: dict[str, Any] = {}
    for key, value in point:
        *sections, last = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return found


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _explain(error: Any) -> str:
    loc, kind = error["loc"], error["type"]
    key = ".".join(str(part) for part in loc if part != "[key]")
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "extra_forbidden":
        section = {1: Study, 3: {"variants": Variant, "adaptations": Adaptation}.get(str(loc[0]))}.get(len(loc))
        return f"{key}: unknown key" + (nearest(str(loc[-1]), list(section.model_fields)) if section else "")
    return f"{key} = {error['input']!r}: {error['msg'].replace('Input should', 'must')}"
