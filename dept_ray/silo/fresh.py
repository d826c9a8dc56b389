"""What a run is before its first round: drawn from the seed or, under `[init]`, taken from another run or a checkpoint.

Body and embedding are the same for whoever makes them, a silo or the coordinator, on whatever machine: draws are from
labels, and what was taken lies copied in this run's folder (`rounds.origin` puts it there). So nobody needs the other
run any more, and it may train on, or be deleted. Who only needs what is drawn reads no file.
"""

from pathlib import Path

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.draws import seed_for
from dept_ray.errors import VocabularyError
from dept_ray.messages import SiloCard, SiloSpec
from dept_ray.silo.model import Body, Embedding, initialise, layout_of
from dept_ray.silo.snapshot import load_snapshot
from dept_ray.text.tokenizer import Vocabulary


def origin_folder(job: Job) -> Path:
    """Where a run keeps what it began from: a snapshot with `body` and, for its own embedding, `embedding`."""
    return Path(job.folder) / "runs" / job.name / "origin"


def fresh_body(job: Job) -> torch.Tensor:
    """theta_0 as one flat vector, (n,) fp32 in the order of `Layout`: the same for every silo and the coordinator.

    Raises:
        StoreError: what was taken is missing or altered.
    """
    if job.init.origin is not None:
        return load_snapshot(origin_folder(job))[0]["body"]["flat"]
    module = Body(job.model)
    initialise(module, torch.Generator().manual_seed(seed_for(job.seed, "body")))
    return layout_of(job.model).flat(dict(module.named_parameters()))  # pyright: ignore[reportArgumentType] - a frozen section has a hash


def fresh_rows(job: Job, vocabulary_size: int) -> torch.Tensor:
    """phi_0 and psi_0 as they are shared: (V + L, D) fp32."""
    embedding = fresh_embedding(job, Vocabulary(vocabulary_size), "shared")
    tables = [embedding.tokens, embedding.positions]
    return torch.cat([table.detach() for table in tables if table is not None])


def fresh_shared(job: Job, spec: SiloSpec, card: SiloCard) -> dict[str, np.ndarray]:
    """What a silo shares with others before the first round: body and rows, as far as they travel."""
    shared: dict[str, np.ndarray] = {}
    if spec.share_body:
        shared["body"] = fresh_body(job).numpy()
    if spec.share_rows:
        rows = fresh_rows(job, card.global_vocabulary_size).numpy()
        shared["rows"] = rows[card.rows_of(len(rows))]
    return shared


def fresh_embedding(job: Job, vocabulary: Vocabulary, *labels: str | int) -> Embedding:
    """phi_0 and psi_0 of a vocabulary's rows.

    Raises:
        VocabularyError: an embedding is to be taken that has other rows.
        StoreError: it is missing or altered.
    """
    if job.init.embedding == "random":
        return drawn_embedding(job, vocabulary.size, *labels)
    tables = load_snapshot(origin_folder(job))[0]["embedding"]
    if len(tables["tokens"]) != vocabulary.global_size:
        raise VocabularyError(
            f'init.embedding = "own": {job.init.origin} has rows for {len(tables["tokens"])} tokens, this job\'s '
            f"vocabulary holds {vocabulary.global_size}: prepare it with the same tokenizer"
        )
    rows = slice(None) if vocabulary.ids is None else torch.from_numpy(vocabulary.ids)
    embedding = Embedding(vocabulary.size, job.model, job.positions)
    embedding.load_state_dict({**tables, "tokens": tables["tokens"][rows]})
    return embedding


def drawn_embedding(job: Job, size: int, *labels: str | int) -> Embedding:
    """`size` rows and the positions, N(0, 0.02), drawn from labels (equation 5)."""
    embedding = Embedding(size, job.model, job.positions)
    initialise(embedding, torch.Generator().manual_seed(seed_for(job.seed, "embedding", *labels)))
    return embedding
