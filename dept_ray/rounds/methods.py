"""The methods as rows of one table of facts (METHOD.md section 2); a new method is a new row.

What a fact means:

- ``vocabulary``: the rows a silo has: the whole ``global`` vocabulary, that one ``trimmed`` to the tokens that occur in
  its text, or the silo's ``own``, with a tokenizer of its own.
- ``share_body``: the outer step moves the body (equation 2). False: plain training, no outer step; the body stays home.
- ``share_rows``: which token rows are averaged (equation 3): ``none``, those that a silo ``owned``, or ``all``.
  Positions travel with the rows: wherever rows are shared at all, all L positions are; else they stay home too.
- ``mixed``: one silo draws from all sources; else each source has a silo.
- ``reset_embedding``: the embedding is drawn afresh every ``inner.local_steps`` steps (active forgetting).

The rest of the package consults these facts and never a method's name. This file trains and sends nothing.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.method_names import MethodName
from dept_ray.sections import Resources

Vocabulary = Literal["global", "trimmed", "own"]
ShareRows = Literal["none", "owned", "all"]

MIXTURE = "mixture"
"""Name of the one silo of a mixed method."""


@dataclass(frozen=True)
class Method:
    """One row of the table; the module docstring says what each fact means."""

    name: MethodName
    vocabulary: Vocabulary
    share_body: bool
    share_rows: ShareRows
    mixed: bool = False
    reset_embedding: bool = False

    @property
    def global_embedding(self) -> bool:
        """Whether there is one embedding of the global vocabulary, which another run may go on with."""
        return self.share_rows != "none" or self.vocabulary == "global"

    @property
    def one_body(self) -> bool:
        """Whether there is one body, and not one of each silo."""
        return self.share_body or self.mixed


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("glob", vocabulary="global", share_body=True, share_rows="all"),
        Method("trim", vocabulary="trimmed", share_body=True, share_rows="owned"),
        Method("spec", vocabulary="trimmed", share_body=True, share_rows="none"),
        Method("spec-opt", vocabulary="own", share_body=True, share_rows="none"),
        Method("std", vocabulary="global", share_body=False, share_rows="none", mixed=True),
        Method("act", vocabulary="global", share_body=False, share_rows="none", mixed=True, reset_embedding=True),
        Method("isolated", vocabulary="trimmed", share_body=False, share_rows="none"),
    )
}


def method_of(job: Job) -> Method:
    """The job's row, with `tokenizer.vocabulary` in place of the row's own vocabulary where it is set.

    Raises:
        ConfigError: rows are shared or sources mixed, and the vocabulary does not allow it.
    """
    row = METHODS[job.method]
    asked = job.tokenizer.vocabulary
    if asked is None:
        return row
    if asked != "global" and (row.mixed or row.share_rows == "all"):
        why = "one silo reads all sources" if row.mixed else "every silo shares every row"
        raise ConfigError(
            f'tokenizer.vocabulary = "{asked}": under method = "{row.name}" {why}, which needs the "global" one; '
            "remove the override or choose another method"
        )
    if asked == "own" and row.share_rows == "owned":
        raise ConfigError(
            f'tokenizer.vocabulary = "own": method = "{row.name}" averages rows among silos, and those of own '
            'tokenizers mean different tokens; set "trimmed" or "global", or choose method = "spec-opt"'
        )
    return replace(row, vocabulary=asked)


def silos_of(job: Job) -> dict[str, tuple[str, ...]]:
    """Silo name -> the sources it trains on: one silo per source, or one `mixture` of all.

    Raises:
        ConfigError: a mixed method, and a source bears the mixture's name; another one, and a source is held out.
    """
    names = job.trained
    if not method_of(job).mixed:
        if job.held_out:
            raise ConfigError(
                f'sources.{job.held_out[0]}.held_out = true: under method = "{job.method}" no silo has a vocabulary '
                'for text that it does not train on; remove the source, or choose method = "std"'
            )
        return {name: (name,) for name in names}
    if MIXTURE in names + job.held_out:
        raise ConfigError(
            f'sources: the name "{MIXTURE}" is the mixed silo\'s own under method = "{job.method}"; rename the source'
        )
    return {MIXTURE: names}


def silos_per_round(job: Job) -> int:
    """|S_t|: `rounds.choose`, or all silos where it is unset; a mixed method has one silo whatever it says."""
    silos = len(silos_of(job))
    return min(job.rounds.choose or silos, silos)


def resources_of(job: Job, silo: str) -> Resources:
    """What a silo holds: its source's own wish, or the job's."""
    return next((s.resources for s in job.sources if s.name == silo and s.resources), None) or job.resources
