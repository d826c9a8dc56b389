"""What a run takes from a Hugging Face checkpoint (`init.checkpoint`): the body of a GPT-2 or a Llama, and its rows.

Settings are held against `[model]` before any tensor is read or fetched. Nobody's silo is asked: what is in a published
checkpoint is nobody's secret.
"""

from typing import Any

import torch

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError
from dept_ray.silo.checkpoint import Checkpoint
from dept_ray.silo.hugging_face import TABLES, body_from, differences
from dept_ray.silo.model import layout_of
from dept_ray.silo.snapshot import Parts
from dept_ray.silo.spelling import spelling
from dept_ray.text.tokenizer import Vocabulary, open_tokenizer, tokenizer_digest, vocabulary_size

_TIED = {"gpt2": True, "llama": False}
"""Whether the head is the token embedding where a config.json does not say."""


def from_checkpoint(job: Job) -> tuple[Parts, dict[str, Any]]:
    """Parts and what is told about them, as `origin.Origin` has them, without a fingerprint.

    Raises:
        ConfigError: there is no such checkpoint, or its model is another.
        StoreError: one of its files is missing or damaged.
    """
    checkpoint = Checkpoint(str(job.init.checkpoint))
    takes_rows = job.init.embedding != "random"
    _check_model(job, checkpoint, takes_rows)
    about: dict[str, Any] = {"checkpoint": checkpoint.place}
    tokenizer = open_tokenizer(checkpoint.tokenizer_file) if takes_rows else None
    take = checkpoint.reader()
    parts = {"body": {"flat": _body(job, body_from(job.model, take))}}
    if tokenizer is None:
        return parts, about
    named = {table: take(name).float() for table, name in TABLES[job.model.arch].items()}
    size, rows = vocabulary_size(tokenizer), len(named["tokens"])
    named["tokens"] = named["tokens"][:size].clone()  # what is beyond is padding, of no token
    if job.init.embedding == "own":
        if rows < size:
            raise ConfigError(
                f'init.embedding = "own": {checkpoint.name} has {rows} rows for the {size} tokens of its tokenizer; '
                'set init.embedding = "overlap"'
            )
        file = checkpoint.tokenizer_file
        about["tokenizer"] = {"file": str(file), "digest": tokenizer_digest(file)}
        return {**parts, "embedding": named}, about
    about["tables"] = {"of-all": spelling(tokenizer, Vocabulary(len(named["tokens"])))}
    return {**parts, "of-all": named}, about


def _check_model(job: Job, checkpoint: Checkpoint, takes_rows: bool) -> None:
    settings, init = checkpoint.settings, job.init
    needed = job.positions if takes_rows and job.model.arch == "gpt2" else None
    mend, cannot = differences(job.model, needed, settings)
    if mend:
        raise ConfigError(f"{init.told} has another model ({'; '.join(mend)}): set [model] to what is there")
    if cannot:
        raise ConfigError(
            f"{init.told} is no model that could be gone on with ({'; '.join(cannot)}): choose another checkpoint"
        )
    if takes_rows and not settings.get("tie_word_embeddings", _TIED[job.model.arch]):
        raise ConfigError(
            f'init.embedding = "{init.embedding}": {checkpoint.name} has a head beside its token embedding '
            '(tie_word_embeddings = false), and ours are one; set init.embedding = "random"'
        )


def _body(job: Job, named: dict[str, torch.Tensor]) -> torch.Tensor:
    layout = layout_of(job.model)  # pyright: ignore[reportArgumentType] - a frozen section has a hash
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if tuple(named[name].shape) != shape:
            raise StoreError(
                f"{job.init.told}: body.{name} is {tuple(named[name].shape)}, its config.json says {shape}: fetch the "
                "checkpoint again"
            )
    return layout.flat(named)
