"""A text goes to the source it is most like, whatever the method; and is worth under it what its model says."""

import math
from collections.abc import Callable

import pytest
from tiny import DOCUMENTS, HELD_OUT, SOURCES, document

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.errors import ConfigError, VocabularyError
from dept_ray.in_process import train_here
from dept_ray.rounds.folder import run_folder
from dept_ray.study.choose import Choice, choose_for, choose_source

UNSEEN = range(DOCUMENTS, DOCUMENTS + HELD_OUT)


def trained(job: Job) -> Run:
    train_here(job, lambda record: None)
    return Run.open(run_folder(job))


@pytest.mark.parametrize("method", ["spec-opt", "spec", "std"])
@pytest.mark.parametrize("length", [40, 1000])
def test_every_held_out_document_is_given_to_its_source(tiny: Callable[..., Job], method: str, length: int):
    job = tiny(method)
    for source in SOURCES:
        for number in UNSEEN:
            choice = choose_source(job, document(source, number)[:length])
            assert choice.source == source
            assert choice.bits.keys() == set(SOURCES)
            assert list(choice.bits.values()) == sorted(choice.bits.values())


def test_figures_are_per_byte_of_text_so_a_text_twice_as_long_costs_no_more(tiny: Callable[..., Job]):
    job, text = tiny("spec-opt"), document("latin", DOCUMENTS) + " "
    once, twice = choose_source(job, text), choose_source(job, text + text)
    for source, bits in once.bits.items():
        assert math.isclose(twice.bits[source], bits, rel_tol=0.01)


def test_who_has_no_row_for_a_token_is_not_chosen_unless_nobody_has(tiny: Callable[..., Job]):
    job = tiny("spec")
    alien = choose_source(job, "lorus QZ")  # letters of no source
    assert set(alien.cannot) == set(SOURCES)
    text = document("latin", DOCUMENTS) + " seventy-"
    mixed = choose_source(job, text)
    assert next(iter(mixed.bits)) == "latin"
    assert "latin" in mixed.cannot
    assert mixed.source not in mixed.cannot or len(mixed.cannot) == len(SOURCES)
    assert choose_source(tiny("spec-opt"), text).cannot == ()


def test_of_no_text_the_first_source_is_told(tiny: Callable[..., Job]):
    assert choose_source(tiny("spec"), "") == Choice("code", {})
    assert choose_source(tiny("spec"), "").why == "source code: the first, for there is no text to choose by"


def test_a_source_that_is_held_out_is_never_chosen(tiny: Callable[..., Job]):
    sources = [source.model_dump(mode="json", exclude_unset=True) for source in tiny("std").sources]
    job = tiny("std", sources=[{**source, "held_out": source["name"] == "latin"} for source in sources])
    assert choose_source(job, document("latin", DOCUMENTS)).source != "latin"


def test_a_source_whose_silo_never_trained_is_not_chosen(tiny: Callable[..., Job]):
    run = trained(tiny("spec-opt", rounds={"total": 1, "choose": 1}))
    (worked,) = next(record for record in run.history() if record["event"] == "round")["silos"]
    (idle, *_) = set(SOURCES) - {worked}
    text = document(idle, DOCUMENTS)
    assert choose_source(run.job, text).source == idle
    assert choose_for(run.job, run.folder, text).source == worked


def test_a_text_is_scored_as_validation_is(tiny: Callable[..., Job]):
    run = trained(tiny("spec-opt", rounds={"total": 1}))
    text = document("latin", DOCUMENTS)
    chosen = run.score_text(text)
    assert chosen["source"] == "latin"
    assert chosen == run.score_text(text, "latin")
    assert chosen["text_bytes"] == len(text)
    other = run.score_text(text, "code")
    assert other["bits_per_byte"] > chosen["bits_per_byte"]
    # The split is these documents one after the other, each with its end; alone, each begins afresh.
    alone = [run.score_text(document("latin", number), "latin") for number in UNSEEN]
    split = run.score()["scores"]["latin"]
    assert sum(score["tokens"] + 1 for score in alone) == split["tokens"]
    assert sum(score["text_bytes"] for score in alone) == split["text_bytes"]
    mean = sum(score["bits_per_byte"] * score["text_bytes"] for score in alone) / split["text_bytes"]
    assert math.isclose(mean, split["bits_per_byte"], rel_tol=0.05)


def test_a_text_that_cannot_be_scored_is_told(tiny: Callable[..., Job]):
    run = trained(tiny("spec", rounds={"total": 1}))
    with pytest.raises(ConfigError, match="the text to be scored is empty"):
        run.score_text("")
    with pytest.raises(VocabularyError, match="trimmed vocabulary"):
        run.score_text("lorus QZ")
    assert list(run.sample("lorus ", tokens=5)) == list(run.sample("lorus ", "latin", tokens=5))
