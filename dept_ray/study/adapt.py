"""Continued pre-training (METHOD.md section 4): what a job that adapts a run takes from it where its file is silent.

An adaptation is a run like any other, of the same trainer, that begins from another run's body (`[init]`). Here stand
only its defaults: the same model, one silo on the mixture of all sources with a global vocabulary, a fifth of the
steps, the peak learning rate of the run for a random embedding and half of it for its own, and as much warm-up for as
many steps.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import load_job
from dept_ray.rounds.changes import changed
from dept_ray.rounds.folder import committed, last_round, load_round, read_job, run_folder
from dept_ray.rounds.origin import tokenizer_file

SHARE_OF_STEPS = 0.2
"""About so many of the steps of pre-training."""


def adapt_job(run: Path, file: str | Path, **overrides: Any) -> Job:
    """The job that goes on from a run's body as a job file says, with the paper's defaults where it says nothing.

    Args:
        run: folder of the run that is adapted.
        file: a job file; at the least its [[sources]].
        overrides: replace what the file says, such as `init={"embedding": "own"}`.

    Raises:
        ConfigError: the file does not describe a job, or the run has not the round that it names.
        StoreError: the run has no committed round.
    """
    state, _ = load_round(run, last_round(run))
    overrides["init"] = {**overrides.get("init", {}), "run": str(run.absolute())}
    job = load_job(file, partial(adaptation, changed(read_job(run), state.changes)), **overrides)
    rounds = committed(run)
    # An adaptation that has begun holds a copy of what it was made of.
    if job.init.round not in (None, *rounds) and not committed(run_folder(job)):
        known = ", ".join(map(str, rounds))
        raise ConfigError(f"init.round = {job.init.round}: run {run} does not have it (any more); it has {known}")
    return job


def adaptation(run: Job, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values for the keys that a job file leaves open.

    Args:
        run: the job of the run that is adapted, in force after its last round.
        values: of the job file.
    """
    own = values.get("init", {}).get("embedding") == "own"
    steps = _count(values, "inner", "local_steps", run.inner.local_steps)
    total = math.ceil(SHARE_OF_STEPS * run.total_steps / steps)
    return {
        "name": f"{run.name}-adapted",
        "folder": run.folder,
        "method": "std",
        "model": {**run.model.model_dump(exclude_none=True), "positions": run.positions},
        "tokenizer": _tokenizer(run, own) if "kind" not in values.get("tokenizer", {}) else {},
        "inner": {
            "lr": run.inner.lr / 2 if own else run.inner.lr,
            "local_steps": steps,
            "batch_size": run.inner.batch_size,
            "context": run.inner.context,
            "warmup_steps": _warmup(run, steps * _count(values, "rounds", "total", total)),
        },
        "rounds": {"total": total},
    }


def _count(values: Mapping[str, Any], section: str, key: str, default: int) -> int:
    """What a job file says, or the default; also for what is no count, which is refused when the job is made."""
    found = values.get(section, {}).get(key)
    return found if isinstance(found, int) and found > 0 else default


def _warmup(run: Job, steps: int) -> int:
    """The run's warm-up in proportion to the steps, a tenth of them at most; at least one where the run has some."""
    mine = round(run.inner.warmup_steps * steps / run.total_steps)
    return min(max(1, min(mine, steps // 10)), run.inner.warmup_steps)


def _tokenizer(run: Job, own: bool) -> dict[str, Any]:
    """The run's very own, whatever the sources, where rows are to keep their meaning; else one made in the same way."""
    if own:
        return {"kind": "file", "name": str(tokenizer_file(run))}
    return run.tokenizer.model_dump(exclude={"vocabulary", "global_vocab_size"}, exclude_none=True)
