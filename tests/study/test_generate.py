"""What a run has trained is used as it was left: the same scores to the last bit, text that hangs on the seed alone."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import document, ready_job

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError, VocabularyError
from dept_ray.in_process import train_here
from dept_ray.metrics import read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.rounds.methods import METHODS
from dept_ray.silo.score import bits_per_byte, loss
from dept_ray.silo.silo import Silo
from dept_ray.study.generate import generate, last_state, load_silo, score_run, silo_of, trained_silo
from dept_ray.text.tokenizer import Vocabulary


def trained(job: Job) -> Job:
    train_here(job, lambda record: None)
    return job


def a_silo(job: Job, source: str = "latin") -> Silo:
    return load_silo(job, last_state(run_folder(job)), silo_of(job, source))


# Loading.


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_scored_as_it_scored_itself(tiny: Callable[..., Job], method: str):
    job = trained(tiny(method))
    record = read_records(run_folder(job) / "metrics.jsonl")[-1]
    round, scores = score_run(job, run_folder(job))
    assert (record["event"], record["round"]) == ("scores", round) == ("scores", 3)
    assert scores.keys() == record["scores"].keys() == {"code", "latin", "numbers"}
    for source, score in scores.items():
        assert loss(score) == record["scores"][source]["loss"]
        assert bits_per_byte(score) == record["scores"][source]["bits_per_byte"]
    assert a_silo(job).score()["latin"] == scores["latin"]


def test_a_source_that_joined_the_run_is_scored_and_used_too(tiny: Callable[..., Job]):
    job, control = tiny("spec"), Control()
    newcomer = job.model_dump(mode="json", exclude_unset=True)["sources"][-1]
    job = job.model_copy(update={"sources": job.sources[:-1]})
    control.change({"add": newcomer})
    train_here(job, lambda record: None, control=control)
    record = read_records(run_folder(job) / "metrics.jsonl")[-1]
    _, scores = score_run(job, run_folder(job))
    assert {source: loss(score) for source, score in scores.items()} == {
        source: figures["loss"] for source, figures in record["scores"].items()
    }
    assert trained_silo(job, run_folder(job), newcomer["name"])[1].score() == {
        newcomer["name"]: scores[newcomer["name"]]
    }


def test_reading_a_run_writes_nothing(tiny: Callable[..., Job]):
    job = trained(tiny("spec"))
    there = {path: path.stat().st_mtime_ns for path in Path(job.folder).rglob("*") if path.is_file()}
    score_run(job, run_folder(job))
    a_silo(job)
    assert {path: path.stat().st_mtime_ns for path in Path(job.folder).rglob("*") if path.is_file()} == there


def test_a_run_without_a_round_has_nothing_to_load(tiny: Callable[..., Job]):
    with pytest.raises(StoreError, match="no committed round yet: train first"):
        last_state(run_folder(tiny("spec")))


def test_a_silo_that_never_trained_is_not_used(tiny: Callable[..., Job]):
    job = trained(tiny("spec", rounds={"total": 1, "choose": 1}))
    state = last_state(run_folder(job))
    resting = [name for name, silo in state.silos.items() if silo.rounds == 0]
    assert len(resting) == 2
    for name in resting:
        with pytest.raises(StoreError, match=rf"silo {name} has not trained in any of the 1 committed rounds"):
            load_silo(job, state, name)


def test_an_unknown_source_is_told_with_the_nearest(tiny: Callable[..., Job]):
    with pytest.raises(ConfigError, match="did you mean latin"):
        silo_of(tiny("spec"), "latn")


# Text.


@pytest.fixture(scope="module")
def latin(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Silo:
    """A trained silo under an own tokenizer."""
    return a_silo(trained(ready_job(prepared, tmp_path_factory.mktemp("generate"), "spec-opt")))


def test_text_hangs_on_the_seed_and_nothing_else(latin: Silo):
    def text(**how: Any) -> str:
        return "".join(generate(latin, "latin", "qui lorus ", 40, **how))

    first = text(seed=1)
    torch.manual_seed(99)
    assert text(seed=1) == first
    assert text(seed=2) != first


def test_temperature_0_takes_the_likeliest_whatever_the_seed(latin: Silo):
    texts = {"".join(generate(latin, "latin", "qui", 20, temperature=0, seed=seed)) for seed in range(3)}
    assert texts == {"".join(generate(latin, "latin", "qui", 20, top_k=1))}


def test_a_long_text_goes_on_past_the_context(latin: Silo):
    prompt = document("latin", 3)
    assert len(latin.corpora["latin"].tokenizer.encode(prompt).ids) > latin.job.inner.context
    assert "".join(generate(latin, "latin", prompt, 40, seed=1))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"num_tokens": 0}, "num_tokens = 0: must be 1 or more"),
        ({"top_k": 0}, "top_k = 0: must be 1 or more"),
        ({"temperature": -0.1}, "temperature = -0.1: must be 0 or more"),
        ({"temperature": float("nan")}, "temperature = nan: must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(latin: Silo, how: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        next(generate(latin, "latin", "", **{"num_tokens": 3, **how}))


def test_a_prompt_that_a_trimmed_vocabulary_has_not_is_refused_at_once(tiny: Callable[..., Job]):
    silo = a_silo(trained(tiny("spec", rounds={"total": 1})))
    pieces = generate(silo, "latin", "lorus ZQ", 5)
    with pytest.raises(VocabularyError, match=r"prompt holds 'Q', 'Z', which source latin never does.*another source"):
        next(pieces)


@dataclass
class Script:
    """A stand-in for a model: says these ids, one after the other."""

    ids: Iterator[int]
    size: int

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, window.shape[1], self.size)
        logits[0, -1, next(self.ids)] = 9.0
        return logits


def says(silo: Silo, *ids: int) -> Any:
    """The silo with a model that says these global ids."""
    corpus = silo.corpora["latin"]

    class Scripted:
        job, corpora, vocabulary = silo.job, silo.corpora, Vocabulary(len(corpus.counts))
        model = Script(itertools.chain(ids), len(corpus.counts))

    return Scripted()


def test_end_of_text_ends_it(latin: Silo):
    corpus = latin.corpora["latin"]
    a = corpus.tokenizer.token_to_id("a")
    assert list(generate(says(latin, a, a, corpus.end_of_text, a), "latin", "", 10, temperature=0)) == ["a", "a"]


def test_num_tokens_ends_it(latin: Silo):
    a = latin.corpora["latin"].tokenizer.token_to_id("a")
    assert list(generate(says(latin, a, a, a), "latin", "", 2, temperature=0)) == ["a", "a"]


@pytest.mark.parametrize("text", ["é", "日本", "a👍b"])
def test_characters_of_several_bytes_are_shown_whole(latin: Silo, text: str):
    tokenizer = latin.corpora["latin"].tokenizer
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()), "this tokenizer has seen no such character: a token a byte"
    shown = list(generate(says(latin, *ids), "latin", "x", len(ids), temperature=0))
    assert shown == list(text)


def test_half_a_character_is_never_shown(latin: Silo):
    ids = latin.corpora["latin"].tokenizer.encode("👍").ids[:3]
    assert list(generate(says(latin, *ids), "latin", "", 3, temperature=0)) == []


def test_a_prompt_may_be_anything_that_the_tokenizer_spells(latin: Silo):
    a = latin.corpora["latin"].tokenizer.token_to_id("a")
    assert list(generate(says(latin, a), "latin", "日本 👍\n", 1, temperature=0)) == ["a"]


def test_the_loaded_model_is_a_copy_of_what_is_shared(latin: Silo):
    state = last_state(run_folder(latin.job))
    assert state.body is not None
    assert np.array_equal(latin.body.numpy(), state.body.numpy())
    assert replace(state, round=0).body is state.body
