"""What a run begins from (`[init]`, METHOD.md section 4), another run or a checkpoint: found, checked, copied.

The copy in the new run's folder is what everybody reads (`silo.fresh`). A run that has committed a round needs the
origin no more; where that is still there and gives something else now, the job is another one, and its folder says so.
What a checkpoint gives is found in `rounds.foreign`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dept_ray.config import Job
from dept_ray.draws import checksum, digest, seed_for
from dept_ray.errors import ConfigError, DeptError, VocabularyError, nearest
from dept_ray.rounds.changes import changed
from dept_ray.rounds.folder import last_round, layout_fingerprint, load_round, read_job, run_folder
from dept_ray.rounds.foreign import from_checkpoint
from dept_ray.rounds.methods import method_of, silos_of
from dept_ray.rounds.state import RunState
from dept_ray.silo.fresh import origin_folder
from dept_ray.silo.snapshot import Parts, load_snapshot, save_snapshot, silo_folder
from dept_ray.silo.spelling import Spelling, spelling, table_of, wanted_by
from dept_ray.silo.warmstart import WAYS, warm_rows
from dept_ray.text.prepare import corpus_folder, tokenizer_kind
from dept_ray.text.shards import open_corpus
from dept_ray.text.tokenizer import tokenizer_digest

TAKEN = ("run", "checkpoint", "round", "silo", "fingerprint")
"""Keys of `[init]` that say what was taken."""


@dataclass(frozen=True)
class Origin:
    """What was found in another run, or in a checkpoint."""

    parts: Parts
    """`body`: {flat: (n,)}; with its own embedding, `embedding`: {tokens: (V, D), positions: (L, D)}; where tokens
    overlap, the like of each silo whose rows are taken."""
    about: dict[str, Any]
    """run or checkpoint, round, silo and fingerprint as `[init]` has them; of its own embedding, tokenizer: digest and
    place; of those that overlap, tables: tokens and tokenizer of each, and fitted_to: for which tokenizer `embedding`
    was made of them."""


def begin(job: Job) -> Job:
    """A job whose `[init]` says exactly what it begins from; that lies in its run's folder when this returns.

    Raises:
        ConfigError: there is no such run, silo or checkpoint, or its model is another.
        StoreError: it has no committed round, or one of its files, or of the copy, is missing or altered.
    """
    if job.init.origin is None:
        return job
    folder = origin_folder(job)
    kept = load_snapshot(folder)[1] if (folder / "state.json").exists() else None
    begun = kept is not None and any((run_folder(job) / "rounds").glob("*/manifest.json"))
    try:
        origin = find(job)
        about = origin.about
        if not begun and (kept is None or kept["fingerprint"] != about["fingerprint"]):
            save_snapshot(folder, origin.parts, about)
    except DeptError:  # it went on and pruned that round, was moved, or deleted
        if kept is None or not begun:
            raise
        about = kept
    taken = {key: about[key] for key in TAKEN if key in about}
    return job.model_copy(update={"init": job.init.model_copy(update=taken)})


def find(job: Job) -> Origin:
    """What `[init]` asks for.

    Raises:
        ConfigError, StoreError: as `begin`.
    """
    if job.init.embedding != "random" and method_of(job).vocabulary == "own":
        raise ConfigError(
            f'init.embedding = "{job.init.embedding}": under method = "{job.method}" this job makes tokenizers '
            'of its own, and their rows mean other tokens; set init.embedding = "random", or choose method = "std"'
        )
    parts, about = from_checkpoint(job) if job.init.checkpoint else _of_run(job)
    seen = [checksum(parts[part][name].numpy()) for part in sorted(parts) for name in sorted(parts[part])]
    about["fingerprint"] = fingerprint = digest(*seen)
    if job.init.fingerprint not in (None, fingerprint):
        told = about.get("checkpoint") or f"round {about['round']} of {about['run']}"
        raise ConfigError(
            f"init.fingerprint = {job.init.fingerprint!r}: {told} is {fingerprint!r}: it was "
            "trained again since; remove the key to begin from what is there now"
        )
    return Origin(parts, about)


def fit_vocabulary(job: Job) -> None:
    """Make the embedding that was taken one of the prepared text's vocabulary; before the run has begun, nothing.

    Raises:
        VocabularyError: it is to be the run's own, whose tokenizer differs: a row would mean two things.
    """
    folder = origin_folder(job)
    if job.init.embedding == "random" or not (folder / "state.json").exists():
        return
    parts, about = load_snapshot(folder)
    mine = tokenizer_digest(tokenizer_file(job))
    if job.init.embedding in WAYS:
        if about.get("fitted_to") != mine:
            embedding = _warm(job, parts, about["tables"])
            save_snapshot(folder, {**parts, "embedding": embedding}, {**about, "fitted_to": mine})
        return
    theirs = about["tokenizer"]
    if mine != theirs["digest"]:
        raise VocabularyError(
            f'init.embedding = "own": the tokenizer of {job.init.origin} is not the one that this job\'s text was '
            f'prepared with: set tokenizer.kind = "file" and tokenizer.name = "{theirs["file"]}", '
            'or init.embedding = "random"'
        )


def tokenizer_file(job: Job) -> Path:
    """The global tokenizer that a job's text is, or will be, prepared with."""
    return corpus_folder(job, job.trained[0], "global") / "tokenizer.json"


# ------------------------------------------------------------------------------------------------ finding
def _of_run(job: Job) -> tuple[Parts, dict[str, Any]]:
    folder = _folder(job)
    there = read_job(folder)
    state, manifest = load_round(folder, job.init.round or last_round(folder))
    there = changed(there, state.changes)
    _check_model(job, there, manifest["layout"])
    silo = _silo(job, there, state)
    home = _home(there, state, silo) if silo else {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    parts["body"] = {"flat": state.body if state.body is not None else home["body"]["flat"]}
    about: dict[str, Any] = {"run": str(folder), "round": state.round, "silo": silo}
    if job.init.embedding == "own":
        parts["embedding"] = _tables(state, there) if state.rows is not None else home["embedding"]
        about["tokenizer"] = {"file": str(tokenizer_file(there)), "digest": tokenizer_digest(tokenizer_file(there))}
    elif job.init.embedding in WAYS:
        whose = [silo] if silo else [None] if state.rows is not None else _trained(state)
        about["tables"] = {}
        for name in whose:
            tables = _tables(state, there) if state.rows is not None else _home(there, state, str(name))["embedding"]
            parts[f"of-{name or 'all'}"] = tables
            about["tables"][f"of-{name or 'all'}"] = _spelling(there, name)
    return parts, about


def _folder(job: Job) -> Path:
    run = str(job.init.run)
    runs = Path(job.folder) / "runs"
    for folder in (Path(run), runs / run):
        if (folder / "config.json").exists():
            if folder.resolve() == run_folder(job).resolve():
                raise ConfigError(f"init.run = {run!r} is this job's own run: give the job another `name`")
            return folder.absolute()
    known = sorted(path.parent.name for path in runs.glob("*/config.json"))
    raise ConfigError(f"init.run = {run!r}: neither a run's folder nor a name under {runs}{nearest(run, known)}")


def _check_model(job: Job, there: Job, layout: str) -> None:
    ours, theirs = ({**each.model.in_force, "positions": each.positions} for each in (job, there))
    if job.init.embedding == "random" or job.model.arch == "llama":  # their table is not taken, or there is none
        theirs["positions"] = ours["positions"]
    differs = [f"model.{key} = {ours[key]!r}, there {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
    if differs:
        raise ConfigError(f"init.run = {job.init.run!r} has another model ({'; '.join(differs)}): copy its [model]")
    if layout != layout_fingerprint(job):
        raise ConfigError(
            f"init.run = {job.init.run!r} was written by a version that orders the body's parameters otherwise: "
            "adapt it with that version"
        )


def _silo(job: Job, there: Job, state: RunState) -> str | None:
    """Whose snapshot holds what is asked for; None: it is shared, so nobody's."""
    method, own, asked = method_of(there), job.init.embedding == "own", job.init.silo
    if own and not method.global_embedding:
        raise ConfigError(
            f'init.embedding = "own": under method = "{there.method}" run {there.name} has no embedding of a global '
            'vocabulary; set init.embedding = "random"'
        )
    if method.share_body and not (own and method.share_rows == "none"):
        if asked is not None:
            raise ConfigError(f"init.silo = {asked!r}: all silos of run {there.name} share what is taken; remove it")
        return None
    trained = _trained(state)
    if asked is None and len(trained) == 1:
        return trained[0]
    if asked not in trained:
        why = "needed, for each silo has a body of its own" if asked is None else "no such silo has trained"
        raise ConfigError(f"init.silo = {asked!r}: {why}; known: {', '.join(trained)}")
    return asked


def _trained(state: RunState) -> list[str]:
    return sorted(name for name, silo in state.silos.items() if silo.snapshot)


def _home(there: Job, state: RunState, silo: str) -> dict[str, dict[str, torch.Tensor]]:
    """What a silo keeps at home."""
    return load_snapshot(silo_folder(there, silo) / str(state.silos[silo].snapshot))[0]


def _spelling(there: Job, silo: str | None) -> Spelling:
    """The tokens of a silo's rows (None: of the shared ones), in the order of the rows, and their tokenizer."""
    vocabulary = method_of(there).vocabulary if silo else "global"
    source = there.trained[0] if silo is None else silos_of(there)[silo][0]
    corpus = open_corpus(corpus_folder(there, source, tokenizer_kind(vocabulary)), verify=False)
    return spelling(corpus.tokenizer, corpus.rows_of(vocabulary))


def _warm(job: Job, parts: Parts, spellings: dict[str, Spelling]) -> dict[str, torch.Tensor]:
    """The embedding of this job's global vocabulary; its positions are those of the first table."""
    corpora = [open_corpus(corpus_folder(job, name, "global"), verify=False) for name in job.trained]
    tables = [table_of(spellings[name], parts[name]["tokens"]) for name in sorted(spellings)]
    wanted = wanted_by(corpora, corpora[0].vocabulary, job.seed)
    generator = torch.Generator().manual_seed(seed_for(job.seed, "overlap"))
    return {**parts[min(spellings)], "tokens": warm_rows(job.init.embedding, wanted, tables, generator)}


def _tables(state: RunState, there: Job) -> dict[str, torch.Tensor]:
    assert state.rows is not None
    learned = there.positions if there.model.arch == "gpt2" else 0
    tokens = state.rows[: len(state.rows) - learned]
    return {"tokens": tokens, "positions": state.rows[len(tokens) :]} if learned else {"tokens": tokens}
