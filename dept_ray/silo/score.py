"""How well a model knows a source: the whole validation split, in nats and in bytes.

Sums of nats are kept and divided once, where a figure is read (`perplexity`, `bits_per_byte`, `normalised`).
Bits per byte is the headline: it compares across vocabularies, perplexity does not (METHOD.md section 4).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dept_ray.messages import Score
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.model import IGNORED, LanguageModel
from dept_ray.text.shards import Corpus, windows
from dept_ray.text.tokenizer import Vocabulary


def score_corpus(
    model: LanguageModel, corpus: Corpus, vocabulary: Vocabulary, context: int, rows: int, hardware: Hardware
) -> Score:
    """Cross-entropy of a corpus's validation split.

    Args:
        model: of the vocabulary's rows.
        corpus: prepared tokens, global ids.
        vocabulary: global ids -> rows.
        context: T; each sequence of the split starts afresh.
        rows: sequences per forward pass.

    Returns:
        Sums over every predicted token of the split, end-of-text included.
    """
    batches = corpus.validation.sweep(context, rows)
    return _score(model, batches, corpus, vocabulary, corpus.validation.text_bytes, hardware)


def score_text(
    model: LanguageModel, text: str, ids: Sequence[int], corpus: Corpus, vocabulary: Vocabulary, context: int,
    rows: int, hardware: Hardware,
) -> Score:  # fmt: skip
    """Cross-entropy of any text, cut into `ids` that the vocabulary has, after a beginning, as `score_corpus`; its end
    is not predicted."""
    batches = windows(np.array([corpus.end_of_text, *ids]), context, rows)
    return _score(model, batches, corpus, vocabulary, len(text.encode()), hardware)


@torch.no_grad()
def _score(
    model: LanguageModel, batches: Iterable[tuple[np.ndarray, np.ndarray]], corpus: Corpus, vocabulary: Vocabulary,
    text_bytes: int, hardware: Hardware,
) -> Score:  # fmt: skip
    surprise = corpus.unigram_nats(vocabulary)
    nats = torch.zeros((), dtype=torch.float64, device=hardware.device)
    unigram, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    for inputs, targets in batches:
        real = targets >= 0
        local = vocabulary.to_local(np.where(real, targets, corpus.end_of_text)).astype(np.int64)
        unigram += float(surprise[local[real]].sum())
        tokens += int(real.sum())
        x = torch.from_numpy(vocabulary.to_local(np.where(real, inputs, corpus.end_of_text)).astype(np.int64))
        y = torch.from_numpy(np.where(real, local, IGNORED))
        with torch.autocast(hardware.device_type, torch.bfloat16, enabled=hardware.autocast):
            nats += model.loss(x.to(hardware.device), y.to(hardware.device)).double()
    model.train(was_training)
    return Score(float(nats), tokens, text_bytes, unigram)


def loss(score: Score) -> float:
    """Nats per token; nan where nothing was scored."""
    return score.nats / score.tokens if score.tokens else math.nan


def perplexity(score: Score) -> float:
    """exp of nats per token; compares within one vocabulary only."""
    nats = loss(score)
    return math.exp(nats) if nats < 700.0 else math.inf if nats >= 700.0 else math.nan


def bits_per_byte(score: Score) -> float:
    """Bits per UTF-8 byte of the text; compares across vocabularies."""
    return score.nats / math.log(2) / score.text_bytes if score.text_bytes else math.nan


def unigram_bits_per_byte(score: Score) -> float:
    """Bits per byte of the smoothed unigram model of the same tokens."""
    return score.unigram_nats / math.log(2) / score.text_bytes if score.text_bytes else math.nan


def normalised(score: Score) -> float:
    """Unigram-normalised cross-entropy, nats per token: CE_model - CE_unigram; the lower, the more was learnt."""
    return (score.nats - score.unigram_nats) / score.tokens if score.tokens else math.nan


def macro(values: Iterable[float]) -> float:
    """Mean over sources, each counting once."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def pooled(scores: Iterable[Score]) -> Score:
    """All sources as one text: sums, for token- and byte-weighted means."""
    found = list(scores)
    return Score(
        sum(s.nats for s in found), sum(s.tokens for s in found), sum(s.text_bytes for s in found),
        sum(s.unigram_nats for s in found),
    )  # fmt: skip
