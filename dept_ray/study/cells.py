"""Which runs a study is made of: a function of the study and of what became of those that are over.

A cell is an ordinary job with an ordinary run folder. What can be run now is told by what is known: a sweep's best
value is known when its trials are over, and a body can be adapted when it is trained. So a study that was killed goes
on by asking again, and nothing of its progress is kept but the runs themselves.

Fair by construction: every variant trains on the base job's tokens (or makes its steps), every body is adapted by the
same steps on the same text, with the same tokenizer where the embedding is new.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import filled, parse_job
from dept_ray.rounds.folder import run_folder
from dept_ray.rounds.methods import method_of, silos_of, silos_per_round
from dept_ray.study.adapt import adaptation
from dept_ray.study.outcomes import Outcome
from dept_ray.study.study_file import Point, Study, Variant, nested, points


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    job: Job
    variant: str
    point: Point
    """Of the grid."""
    tried: Point
    """Of the variant's sweep."""
    seed: int
    adaptation: str = ""
    """Its name; empty: this is the training of a body."""
    taken: bool = True
    """Whether it is in the table: of a sweep's trials only the best is."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.job.name

    @property
    def row(self) -> str:
        """Of the table, such as `std` or `std lr 0.003`."""
        return " ".join([self.variant, *(f"{_short(key)} {value}" for key, value in self.point)])

    @property
    def tokens(self) -> int:
        """It will train on, all silos."""
        return _tokens(self.job)


def cells_of(study: Study, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """The cells that are known, those that are over among them.

    Args:
        study: whose.
        outcomes: of those that are over, by name.

    Raises:
        ConfigError: a variant or an adaptation does not describe a job, or cannot be matched to the base job.
    """
    base = _base(study)
    cells: list[Cell] = []
    for name, variant in study.variants.items():
        for point in points(study.grid):
            tries = points(variant.sweep)
            trials = [_body(study, base, name, variant, point, tried, study.seeds[0]) for tried in tries]
            best = _best(trials, outcomes)
            cells += [replace(trial, taken=trial is best) for trial in trials]
            if best is None:
                continue
            others = [_body(study, base, name, variant, point, best.tried, seed) for seed in study.seeds[1:]]
            cells += others
            for body in (best, *others):
                if body.name in outcomes and outcomes[body.name].finished:
                    cells += _adaptations(study, base, body)
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"study {study.name}: two runs would be called {twice[0]}; name variants and keys otherwise")
    return cells


def all_cells(study: Study, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """As `cells_of`, as if all that is not over were finished; of a sweep that is not over, its first value wins.

    Raises:
        ConfigError: as `cells_of`.
    """
    assumed = dict(outcomes)
    while True:
        cells = cells_of(study, assumed)
        new = [cell.name for cell in cells if cell.name not in assumed]
        if not new:
            return cells
        assumed |= dict.fromkeys(new, Outcome("finished"))


def _best(trials: list[Cell], outcomes: Mapping[str, Outcome]) -> Cell | None:
    """The best in distribution; None: not all are over. Of one that is no question."""
    if len(trials) == 1:
        return trials[0]
    if any(trial.name not in outcomes for trial in trials):
        return None
    return min(trials, key=lambda trial: outcomes[trial.name].worth)


# ------------------------------------------------------------------------------------------------ training bodies
@dataclass(frozen=True)
class _Base:
    values: dict[str, Any]
    """Of the base job's file."""
    job: Job
    """With those sources that are trained on."""


def _base(study: Study) -> _Base:
    sources = [source for source in study.job.get("sources", []) if not source.get("held_out")]
    values = {**study.job, "sources": sources, "name": study.name, "folder": study.folder}
    return _Base(study.job, parse_job(values, where=f"study {study.name}, [job]"))


def _body(
    study: Study, base: _Base, name: str, variant: Variant, point: Point, tried: Point, seed: int
) -> Cell:  # fmt: skip
    """The training of one body."""
    trained = [source for source in base.values["sources"] if not source.get("held_out")]
    values = filled(nested(point + tried), filled(variant.job, {**base.values, "sources": trained}))
    if variant.dealt:
        values["sources"] = _dealt(values["sources"])
    called = [study.name, name, *(f"{_short(key)}{value}" for key, value in point + tried), f"s{seed}"]
    values |= {"name": ".".join(called), "folder": study.folder, "seed": seed}
    where = f"study {study.name}, [variants.{name}]"
    job = parse_job(values, where)
    return Cell(_matched(job, base.job, variant, where), name, point, tried, seed)


def _matched(job: Job, base: Job, variant: Variant, where: str) -> Job:
    """The job with as many rounds as make its steps, or its tokens, those of the base job."""
    each = job.inner.local_steps if variant.match == "steps" else _tokens(job) // job.rounds.total
    wanted = base.total_steps if variant.match == "steps" else _tokens(base)
    total, rest = divmod(wanted, each)
    if rest or not total:
        raise ConfigError(
            f"{where}: {wanted:,} {variant.match}, as the base job's, are no whole number of rounds of {each:,}: "
            "choose inner.local_steps, inner.batch_size and inner.context so that they are"
        )
    every = job.rounds.score_every
    often = {"total": total, "score_every": every and max(1, round(every * total / base.rounds.total))}
    return job.model_copy(update={"rounds": job.rounds.model_copy(update=often)})


def _dealt(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many sources, each of them a share of the text of all."""
    return [
        {"name": f"share-{share}", "kind": "dealt", "of": sources, "share": share, "shares": len(sources)}
        for share in range(len(sources))
    ]


# ------------------------------------------------------------------------------------------------ adapting them
def _adaptations(study: Study, base: _Base, body: Cell) -> list[Cell]:
    """All that is made of a body; what its method has no embedding for is left out."""
    method = method_of(body.job)
    silos: list[str | None] = [None] if method.one_body else [*silos_of(body.job)]
    cells = []
    for name, wish in study.adaptations.items():
        own = wish.job.get("init", {}).get("embedding") == "own"
        if own and not method.global_embedding:
            continue
        # Of the body's own job: model, learning rate and, where rows keep their meaning, tokenizer. All else is alike.
        keys = ("local_steps", "batch_size", "context", "warmup_steps")
        shape = {key: getattr(base.job.inner, key) for key in keys}
        alike = {
            "rounds": base.job.rounds,
            "inner": body.job.inner.model_copy(update=shape),
            "model": body.job.model.model_copy(update={"positions": body.job.positions}),
            "tokenizer": body.job.tokenizer if own else base.job.tokenizer,
        }
        values = filled(adaptation(body.job.model_copy(update=alike), wish.job), _inherited(base.values))
        said = base.values.get("inner", {})
        values["inner"] |= {key: said[key] for key in said.keys() & {"warmup_steps"}}  # for all runs of the study
        for silo in silos:
            called = [body.name, name, *([f"of-{silo}"] if silo else [])]
            init = {"run": str(run_folder(body.job)), **({"silo": silo} if silo else {})}
            given = {"name": ".".join(called), "folder": study.folder, "seed": body.seed, "init": init}
            job = parse_job(filled(given, filled(wish.job, values)), f"study {study.name}, [adaptations.{name}]")
            cells.append(replace(body, job=job, adaptation=name, taken=True))
    return cells


def _inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the base job's values, those that hold for an adaptation too."""
    tokenizer = {k: v for k, v in values.get("tokenizer", {}).items() if k not in ("vocabulary", "global_vocab_size")}
    rounds = {k: v for k, v in values.get("rounds", {}).items() if k != "choose"}
    return {**values, "tokenizer": tokenizer, "rounds": rounds}


def _tokens(job: Job) -> int:
    return math.prod((job.total_steps, job.inner.batch_size, job.inner.context, silos_per_round(job)))


def _short(key: str) -> str:
    """The last part of a key.

    >>> _short("inner.lr")
    'lr'
    """
    return key.rpartition(".")[2]
