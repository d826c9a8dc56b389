"""Scores are sums over the whole validation split, each prediction once, and its text's true bytes."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import DOCUMENTS, HELD_OUT, SOURCES, document

from dept_ray.messages import Score
from dept_ray.silo import score as figures
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.model import IGNORED, Body, Embedding, LanguageModel, initialise
from dept_ray.silo.score import score_corpus
from dept_ray.text.prepare import corpus_folder
from dept_ray.text.shards import Corpus, open_corpus
from dept_ray.text.tokenizer import Vocabulary

CPU = Hardware("cpu", 1, False, False, 4)
TEXT = {name: [document(name, i) for i in range(DOCUMENTS, DOCUMENTS + HELD_OUT)] for name in SOURCES}


@pytest.fixture
def corpora(tiny) -> dict[str, Corpus]:
    job = tiny("glob")
    return {name: open_corpus(corpus_folder(job, name, "global")) for name in SOURCES}


def model_of(vocabulary: Vocabulary, tiny, constant: bool = False) -> LanguageModel:
    """Random, or one that finds every token equally likely."""
    section = tiny("glob").model
    model = LanguageModel(Body(section), Embedding(vocabulary.size, section, 32))
    initialise(model, torch.Generator().manual_seed(0))
    if constant:
        torch.nn.init.zeros_(model.embedding.tokens)
    return model


def tokens_of(corpus: Corpus) -> list[np.ndarray]:
    return [np.array(corpus.validation.map(i)) for i in range(len(corpus.validation.files))]


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_that_knows_nothing_needs_log_v_a_token(corpora, tiny, name):
    corpus = corpora[name]
    found = score_corpus(model_of(corpus.vocabulary, tiny, constant=True), corpus, corpus.vocabulary, 32, 8, CPU)
    tokens, num_bytes = len(tokens_of(corpus)[0]) - 1, sum(len(text.encode()) for text in TEXT[name])
    assert (found.tokens, found.text_bytes) == (tokens, num_bytes)
    assert found.nats == pytest.approx(tokens * math.log(300), rel=1e-6)
    assert figures.bits_per_byte(found) == pytest.approx(tokens * math.log2(300) / num_bytes, rel=1e-6)
    assert figures.perplexity(found) == pytest.approx(300, rel=1e-5)


@pytest.mark.parametrize("context", [7, 32, 5000])
def test_every_token_but_the_first_is_predicted_once_in_order(corpora, context):
    """A stand-in for a model writes down what it is asked."""
    corpus = corpora["latin"]

    class Listener(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

        def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            assert ids.shape == targets.shape == (len(ids), context)
            real = targets != IGNORED
            self.asked.append((ids[real], targets[real]))
            return real.sum().float()

    listener = Listener()
    found = score_corpus(listener, corpus, corpus.vocabulary, context, 3, CPU)
    (tokens,) = tokens_of(corpus)
    inputs, targets = (torch.cat(parts).numpy() for parts in zip(*listener.asked, strict=True))
    np.testing.assert_array_equal(inputs, tokens[:-1])
    np.testing.assert_array_equal(targets, tokens[1:])
    assert found.nats == found.tokens == len(tokens) - 1


def test_how_many_rows_go_at_a_time_does_not_matter(corpora, tiny):
    corpus = corpora["code"]
    model = model_of(corpus.vocabulary, tiny)
    few, many = (score_corpus(model, corpus, corpus.vocabulary, 32, rows, CPU) for rows in (1, 1000))
    assert few.nats == pytest.approx(many.nats, rel=1e-6)
    assert (few.tokens, few.unigram_nats) == (many.tokens, pytest.approx(many.unigram_nats, rel=1e-9))


def test_a_trimmed_vocabulary_scores_the_same_text(corpora, tiny):
    """Same tokens and bytes, so that bits per byte compare; the same logits, but among fewer rows."""
    corpus = corpora["numbers"]
    whole = model_of(corpus.vocabulary, tiny)
    trimmed = model_of(corpus.trimmed, tiny)
    assert corpus.trimmed.size < corpus.vocabulary.size
    with torch.no_grad():
        trimmed.embedding.tokens.copy_(whole.embedding.tokens[corpus.trimmed.ids])
    trimmed.embedding.positions = whole.embedding.positions
    trimmed.body = whole.body
    a = score_corpus(whole, corpus, corpus.vocabulary, 32, 8, CPU)
    b = score_corpus(trimmed, corpus, corpus.trimmed, 32, 8, CPU)
    assert (a.tokens, a.text_bytes) == (b.tokens, b.text_bytes)
    assert b.nats < a.nats
    constant = score_corpus(model_of(corpus.trimmed, tiny, constant=True), corpus, corpus.trimmed, 32, 8, CPU)
    assert constant.nats == pytest.approx(a.tokens * math.log(corpus.trimmed.size), rel=1e-6)


@pytest.mark.parametrize("trimmed", [True, False])
def test_the_unigram_figure_is_that_of_smoothed_training_counts(corpora, tiny, trimmed):
    corpus = corpora["code"]
    vocabulary = corpus.trimmed if trimmed else corpus.vocabulary
    train = np.concatenate([np.array(corpus.train.map(i)) for i in range(len(corpus.train.files))])
    counts = np.bincount(train, minlength=300)
    by_hand = 0.0
    for token in tokens_of(corpus)[0][1:]:
        by_hand -= math.log((counts[token] + 1) / (len(train) + vocabulary.size))
    found = score_corpus(model_of(vocabulary, tiny, constant=True), corpus, vocabulary, 32, 8, CPU)
    assert found.unigram_nats == pytest.approx(by_hand, rel=1e-9)
    assert figures.unigram_bits_per_byte(found) == pytest.approx(by_hand / math.log(2) / found.text_bytes, rel=1e-9)
    assert figures.normalised(found) == pytest.approx(math.log(vocabulary.size) - by_hand / found.tokens, rel=1e-5)


def test_scoring_leaves_the_model_as_it_was(corpora, tiny):
    corpus = corpora["code"]
    model = model_of(corpus.vocabulary, tiny).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_corpus(model, corpus, corpus.vocabulary, 32, 8, CPU)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_figures_by_hand():
    score = Score(nats=8 * math.log(2), tokens=4, text_bytes=16, unigram_nats=12 * math.log(2))
    assert figures.loss(score) == pytest.approx(2 * math.log(2))
    assert figures.perplexity(score) == pytest.approx(4)
    assert figures.bits_per_byte(score) == pytest.approx(0.5)
    assert figures.unigram_bits_per_byte(score) == pytest.approx(0.75)
    assert figures.normalised(score) == pytest.approx(-math.log(2))
    assert figures.pooled([score, score]) == Score(2 * score.nats, 8, 32, 2 * score.unigram_nats)
    assert figures.macro([1.0, 2.0, 6.0]) == 3.0


def test_a_diverged_model_still_has_a_perplexity_that_json_can_hold():
    assert json.loads(json.dumps(figures.perplexity(Score(1e9, 1, 1, 1.0)))) > 1e300
