"""Using what a run has trained: its model for one source, scores without Ray, and text.

A model is the body with some embedding: rows of the run folder where rows are shared, else the silo's own snapshot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.draws import seed_for
from dept_ray.errors import ConfigError, StoreError
from dept_ray.messages import Score, SiloCard
from dept_ray.rounds.methods import silos_of
from dept_ray.rounds.pool import specs_of
from dept_ray.rounds.state import RunState, rows_of
from dept_ray.rounds.store import load_round
from dept_ray.silo.hardware import choose_hardware
from dept_ray.silo.model import Body, Embedding, LanguageModel, Layout, flatten_parameters
from dept_ray.silo.score import score_corpus
from dept_ray.silo.silo import open_corpora, silo_folder, vocabulary_of
from dept_ray.silo.snapshot import load_snapshot
from dept_ray.text.shards import Corpus
from dept_ray.text.tokenizer import Vocabulary


@dataclass(frozen=True)
class Trained:
    """What a run knows of one silo, ready to use."""

    job: Job
    model: LanguageModel
    vocabulary: Vocabulary
    corpora: dict[str, Corpus]


def last_state(folder: Path) -> RunState:
    """The last committed round of a run.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    rounds = sorted(int(path.parent.name) for path in (folder / "rounds").glob("*/manifest.json"))
    if not rounds:
        raise StoreError(f"run folder {folder} has no committed round yet: train first")
    return load_round(folder, rounds[-1])[0]


def load_silo(job: Job, state: RunState, silo: str) -> Trained:
    """The model of one silo after a committed round.

    Raises:
        StoreError: its snapshot is missing; ShardError: its tokens are.
    """
    spec = specs_of(job)[silo]
    corpora = open_corpora(job, spec)
    vocabulary = vocabulary_of(spec, corpora)
    model = LanguageModel(Body(job.model), Embedding(vocabulary.size, job.model, job.positions))
    flat, _ = flatten_parameters(model.body, Layout.of(model.body))
    parts = {}
    if not (spec.share_body and spec.share_rows):
        snapshot = state.silos[silo].snapshot
        if snapshot is None:
            raise StoreError(f"silo {silo} has not trained yet, so it has no embedding: train more rounds")
        parts, _ = load_snapshot(silo_folder(job, silo) / snapshot)
    with torch.no_grad():
        flat.copy_(state.body if state.body is not None else parts["body"]["flat"])
        if state.rows is not None:
            card = SiloCard(silo, spec.sources, vocabulary.size, {}, owned_rows=vocabulary.ids, global_vocabulary_size=vocabulary.global_size)
            rows = state.rows[rows_of(card, len(state.rows))]
            model.embedding.tokens.copy_(rows[: vocabulary.size])
            if model.embedding.positions is not None:
                model.embedding.positions.copy_(rows[vocabulary.size :])
        else:
            model.embedding.load_state_dict(parts["embedding"])
    return Trained(job, model.eval(), vocabulary, corpora)


def silo_of(job: Job, source: str) -> str:
    """The silo that trains a source."""
    job.source(source)
    return next(silo for silo, sources in silos_of(job).items() if source in sources)


def score_run(job: Job, folder: Path) -> tuple[int, dict[str, Score]]:
    """Validation of every source that has been trained, in this process.

    Returns:
        The committed round, and the scores.
    """
    state = last_state(folder)
    scores = {}
    for silo, spec in specs_of(job).items():
        if state.silos[silo].rounds == 0:
            continue
        trained = load_silo(job, state, silo)
        hardware = choose_hardware(job, spec.threads, gpu=False)
        for source, corpus in trained.corpora.items():
            rows = max(1, 8192 // job.inner.context)
            scores[source] = score_corpus(trained.model, corpus, trained.vocabulary, job.inner.context, rows, hardware)
    return state.round, scores


@torch.no_grad()
def generate(
    trained: Trained, source: str, prompt: str, num_tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Iterator[str]:
    """Text after a prompt, piece by piece.

    Args:
        trained: the model.
        source: whose tokenizer to use.
        prompt: may be empty.
        num_tokens: at most; it ends early at an end of text.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among that many.
        seed: of the draws.

    Raises:
        VocabularyError: the prompt holds a token that a trimmed vocabulary has not.
        ConfigError: a number out of range.
    """
    if num_tokens < 1 or top_k < 1 or temperature < 0:
        raise ConfigError(f"num_tokens = {num_tokens}, top_k = {top_k}, temperature = {temperature}: must be positive")
    corpus = trained.corpora[source]
    tokenizer = corpus.tokenizer
    ids = [corpus.end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    local = trained.vocabulary.to_local(np.array(ids)).tolist()
    draw = torch.Generator().manual_seed(seed_for(seed, "generate", source))
    shown = tokenizer.decode(ids[1:])
    for _ in range(num_tokens):
        window = torch.tensor([local[-trained.job.inner.context :]])
        logits = trained.model(window)[0, -1].float()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            best = logits.topk(min(top_k, len(logits)))
            p = torch.softmax(best.values / temperature, -1)
            chosen = int(best.indices[torch.multinomial(p, 1, generator=draw)])
        global_id = int(trained.vocabulary.to_global(np.array([chosen]))[0])
        if global_id == corpus.end_of_text:
            return
        local.append(chosen)
        ids.append(global_id)
        text = tokenizer.decode(ids[1:])
        # A character of several bytes is shown once it is whole: until then its decoding ends in U+FFFD.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
