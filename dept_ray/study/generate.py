"""Using what a run has trained: its model for one source, scores without Ray, and text.

A committed round says all that there is to know of a silo. So a trained silo is one that was ordered to take no step
after that round: it restores what stays home, takes what is shared, and is then used where it stands.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.draws import seed_for
from dept_ray.errors import ConfigError, StoreError
from dept_ray.messages import Score
from dept_ray.rounds.changes import changed
from dept_ray.rounds.folder import last_round, load_round
from dept_ray.rounds.pool import specs_of
from dept_ray.rounds.state import RunState
from dept_ray.rounds.train import orders_for
from dept_ray.silo.silo import Silo
from dept_ray.study.home import check_at_home
from dept_ray.text.tokenizer import check_rows


def last_state(folder: Path) -> RunState:
    """The last committed round of a run.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    return load_round(folder, last_round(folder))[0]


def silo_of(job: Job, source: str) -> str:
    """The silo that trains a source, or scores it.

    Raises:
        ConfigError: the job has no such source.
    """
    job.source(source)
    return next(name for name, silo in specs_of(job).items() if source in (*silo.sources, *silo.held_out))


def load_silo(job: Job, state: RunState, silo: str) -> Silo:
    """One silo as a committed round left it, on the CPU; its `model` is ready to use.

    Args:
        job: in force after that round.
        state: of the round.
        silo: its name.

    Raises:
        StoreError: it has not trained yet, or its snapshot is missing.
        ShardError: its prepared tokens are.
    """
    if state.silos[silo].rounds == 0:
        raise StoreError(f"silo {silo} has not trained in any of the {state.round} committed rounds: train more")
    return _loaded(job, state, silo)[0]


def trained_silo(job: Job, folder: Path, source: str) -> tuple[RunState, Silo]:
    """The silo that trains a source, as the last committed round left it, and that round.

    Its `job` is the one in force then: with every change that was made while the run went on.

    Raises:
        ConfigError: the run has no such source.
        StoreError: no round is committed, or the silo has not trained in any.
        ShardError: its prepared tokens are not here.
    """
    state = last_state(folder)
    job = changed(job, state.changes)
    return state, load_silo(job, state, silo_of(job, source))


def score_run(job: Job, folder: Path, source: str | None = None) -> tuple[int, dict[str, Score]]:
    """Validation of every source after the last committed round, in this process.

    Args:
        job: as the run began.
        folder: of the run.
        source: only this one; None: all.

    Returns:
        The round, and the scores: where it was trained on this machine's CPU, those of its own final record. A source
        without validation text has none.

    Raises:
        ConfigError: the run has no such source.
        StoreError: no round is committed yet.
        ShardError: a source's prepared tokens are not here.
    """
    state = last_state(folder)
    job = changed(job, state.changes)
    scores: dict[str, Score] = {}
    for silo in state.silos if source is None else [silo_of(job, source)]:
        scores |= _loaded(job, state, silo, score=True)[1]
    return state.round, {name: score for name, score in scores.items() if source in (None, name)}


def _loaded(job: Job, state: RunState, name: str, score: bool = False) -> tuple[Silo, dict[str, Score]]:
    spec = replace(specs_of(job)[name], gpu=False)
    for source in spec.sources:
        check_at_home(job, source)
    silo = Silo(job, spec)
    order = orders_for(job, state, [name], {name: silo.card()}, attempt=0, steps=0)[name]
    try:
        scores = silo.obey(replace(order, score=score)).scores
    finally:
        silo.stream.close()
    silo.model.eval()
    return silo, scores


@torch.no_grad()
def generate(
    silo: Silo, source: str, prompt: str, num_tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Iterator[str]:
    """Text after a prompt, piece by piece.

    Args:
        silo: as `load_silo` gives it.
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
    for name, value, least in (("num_tokens", num_tokens, 1), ("top_k", top_k, 1), ("temperature", temperature, 0)):
        if not value >= least:
            raise ConfigError(f"{name} = {value}: must be {least} or more")
    corpus, vocabulary, context = silo.corpora[source], silo.vocabulary, silo.job.inner.context
    tokenizer = corpus.tokenizer
    ids = [corpus.end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    check_rows(vocabulary, tokenizer, ids, "the prompt", source)
    local = vocabulary.to_local(np.array(ids)).tolist()
    draw = torch.Generator().manual_seed(seed_for(seed, "generate", source))
    shown = tokenizer.decode(ids[1:])
    for _ in range(num_tokens):
        logits = silo.model(torch.tensor([local[-context:]]))[0, -1].float()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            best = logits.topk(min(top_k, len(logits)))
            p = torch.softmax(best.values / temperature, -1)
            chosen = int(best.indices[torch.multinomial(p, 1, generator=draw)])
        global_id = int(vocabulary.to_global(np.array([chosen]))[0])
        if global_id == corpus.end_of_text:
            return
        local.append(chosen)
        ids.append(global_id)
        text = tokenizer.decode(ids[1:])
        # A character of several bytes is shown once it is whole: until then its decoding ends in U+FFFD.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
