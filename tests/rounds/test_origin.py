"""A run goes on from another's body, and from its embedding where that fits; it begins to the bit where it was left."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ready_job

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError, VocabularyError, WrongRunError
from dept_ray.in_process import train_here
from dept_ray.metrics import read_records
from dept_ray.preparing import begun, prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import last_round, load_round, run_folder
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.origin import tokenizer_file
from dept_ray.rounds.pool import specs_of
from dept_ray.rounds.state import RunState, fresh_state
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import orders_for
from dept_ray.silo.fresh import drawn_embedding, fresh_body, fresh_embedding, fresh_rows
from dept_ray.silo.silo import Silo
from dept_ray.silo.snapshot import load_snapshot, silo_folder
from dept_ray.silo.warmstart import WAYS
from dept_ray.text.prepare import corpus_folder, global_tokenizer_folder
from dept_ray.text.tokenizer import Vocabulary

HELD_OUT = "numbers"


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """`trained(method)`: its tiny job, trained once for this module; to be read only."""

    @functools.cache
    def train_once(method: str) -> Job:
        job = ready_job(prepared, tmp_path_factory.mktemp(method), method, rounds={"keep": 9})
        train_here(job, lambda record: None)
        return job

    return train_once


def adapting(tiny: Callable[..., Job], run: Job, method: str = "std", at: str = "adapted", **changes: Any) -> Job:
    init = {"run": str(run_folder(run)), **changes.pop("init", {})}
    return tiny(method, at, name="adapted", init=init, **changes)


def body_of(run: Job, round: int | None = None, silo: str = "mixture") -> torch.Tensor:
    """A run's body after a round, wherever it is."""
    state, _ = load_round(run_folder(run), round or last_round(run_folder(run)))
    if state.body is not None:
        return state.body
    return load_snapshot(silo_folder(run, silo) / str(state.silos[silo].snapshot))[0]["body"]["flat"]


def run_rounds(job: Job, rounds: int | None = None) -> RunState:
    """Train to the end, or stop after so many rounds."""
    control = Control()

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == rounds:
            control.stop()

    return train_here(job, stop, control=control)


def opened(job: Job) -> Silo:
    """The first silo, as the first order finds it."""
    silo = Silo(job, next(iter(specs_of(job).values())))
    cards = {silo.spec.silo: silo.card()}
    order = orders_for(job, fresh_state(job, method_of(job), cards), list(cards), cards, attempt=0, steps=0)
    silo.obey(order[silo.spec.silo])
    silo.stream.close()
    return silo


# The body.


@pytest.mark.parametrize("method", ["spec-opt", "spec", "trim", "glob", "std", "act"])
def test_a_run_begins_from_the_body_of_another_to_the_bit(trained, tiny, method: str):
    job = begun(adapting(tiny, trained(method)))
    assert torch.equal(opened(job).body, body_of(trained(method)))
    assert not torch.equal(fresh_body(job), fresh_body(tiny("std", "drawn")))


def test_of_bodies_that_stay_home_the_one_named_is_taken(trained, tiny):
    isolated = trained("isolated")
    with pytest.raises(ConfigError, match=r"init.silo = None: needed, .*; known: code, latin, numbers"):
        begun(adapting(tiny, isolated))
    with pytest.raises(ConfigError, match=r"init.silo = 'latn': no such silo has trained"):
        begun(adapting(tiny, isolated, init={"silo": "latn"}))
    job = begun(adapting(tiny, isolated, init={"silo": "latin"}))
    assert torch.equal(opened(job).body, body_of(isolated, silo="latin"))
    with pytest.raises(ConfigError, match=r"init.silo = 'latin': all silos of run tiny-spec share"):
        begun(adapting(tiny, trained("spec"), at="other", init={"silo": "latin"}))


def test_any_round_that_is_still_there_may_be_named(trained, tiny):
    first = begun(adapting(tiny, trained("spec"), init={"round": 1}))
    assert first.init.round == 1
    assert torch.equal(fresh_body(first), body_of(trained("spec"), 1))
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        begun(adapting(tiny, trained("spec"), at="other", init={"round": 7}))


@pytest.mark.parametrize(("method", "codec"), [("spec-opt", "int8"), ("glob", "int4"), ("isolated", "fp32")])
def test_every_method_may_begin_from_another_run(trained, tiny, method: str, codec: str):
    job = begun(adapting(tiny, trained("std"), method, wire={"codec": codec}))
    begin = body_of(trained("std"))
    assert torch.equal(opened(job).body, begin)
    state = run_rounds(job)
    assert state.round == 3
    if state.body is not None:
        assert not torch.equal(state.body, begin)


def test_a_frozen_body_stands_still_while_the_embedding_learns(trained, tiny):
    job = adapting(tiny, trained("spec"), init={"frozen_body": True}, rounds={"total": 2})
    run_rounds(job)
    assert torch.equal(body_of(job), body_of(trained("spec")))
    records = read_records(run_folder(job) / "metrics.jsonl")
    assert records[-1]["mean"]["bits_per_byte"] < records[0]["mean"]["bits_per_byte"]


# The embedding.


def test_a_random_embedding_is_drawn_like_any_other(trained, tiny):
    adapted, plain = opened(begun(adapting(tiny, trained("spec")))), opened(tiny("std"))
    assert torch.equal(adapted.model.embedding.tokens, plain.model.embedding.tokens)
    assert torch.equal(adapted.model.embedding.positions, plain.model.embedding.positions)


@pytest.mark.parametrize("method", ["std", "glob", "trim"])
def test_its_own_embedding_is_the_one_that_the_run_had(trained, tiny, method: str):
    run = trained(method)
    embedding = opened(begun(adapting(tiny, run, init={"embedding": "own"}))).model.embedding
    state, _ = load_round(run_folder(run), 3)
    if state.rows is not None:
        theirs = state.rows
    else:
        tables = load_snapshot(silo_folder(run, "mixture") / str(state.silos["mixture"].snapshot))[0]["embedding"]
        theirs = torch.cat([tables["tokens"], tables["positions"]])
    assert torch.equal(torch.cat([embedding.tokens, embedding.positions]), theirs)


def test_a_run_that_shares_rows_begins_with_all_of_them_and_a_trimmed_silo_with_its_own(trained, tiny):
    run = trained("glob")
    rows = load_round(run_folder(run), 3)[0].rows
    shared = begun(adapting(tiny, run, "trim", init={"embedding": "own"}))
    assert torch.equal(fresh_rows(shared, 300), rows)
    home = begun(adapting(tiny, run, "spec", at="other", init={"embedding": "own"}))
    silo = opened(home)
    assert silo.vocabulary.size < 300
    assert torch.equal(silo.model.embedding.tokens, rows[silo.vocabulary.ids])


@pytest.mark.parametrize("way", WAYS)
def test_where_the_tokens_are_the_same_the_rows_of_every_way_are_the_run_s_own(trained, tiny, way: str):
    own, overlap = (
        begin_prepared(adapting(tiny, trained("trim"), at=kind, init={"embedding": kind})) for kind in ("own", way)
    )
    assert torch.equal(fresh_rows(own, 300), fresh_rows(overlap, 300))


@pytest.mark.parametrize(
    ("method", "way"), [("spec", "overlap"), ("std", "overlap"), *(("spec-opt", way) for way in WAYS)]
)
def test_tokens_that_a_silo_knew_begin_from_its_rows(trained, tiny, method: str, way: str):
    run = trained(method)
    job = begin_prepared(adapting(tiny, run, init={"embedding": way}))
    rows = fresh_embedding(job, Vocabulary(300), "mixture").tokens
    assert torch.isfinite(rows).all()
    first = sorted(specs_of(run))[0]
    state, _ = load_round(run_folder(run), 3)
    theirs = load_snapshot(silo_folder(run, first) / str(state.silos[first].snapshot))[0]["embedding"]["tokens"]
    taken = (rows[:, None] == theirs[None]).all(-1).any(1).sum()
    assert taken > 0, "what only the first silo knew is there to the bit"
    assert run_rounds(job).round == 3


def begin_prepared(job: Job) -> Job:
    job = begun(job)
    prepare(job, local=True)
    return job


def test_active_forgetting_still_draws_its_embedding_anew(trained, tiny):
    job = adapting(tiny, trained("std"), "act", init={"embedding": "own"})
    assert run_rounds(job).round == 3
    drawn = drawn_embedding(job, 300, "mixture", 1)
    assert not torch.equal(drawn.tokens, fresh_embedding(begun(job), Vocabulary(300), "mixture").tokens)


def test_an_embedding_without_a_global_vocabulary_cannot_be_taken(trained, tiny):
    for method in ("spec", "spec-opt", "isolated"):
        with pytest.raises(ConfigError, match=r'init.embedding = "own": under method = ".*" run .* has no embedding'):
            begun(adapting(tiny, trained(method), at=method, init={"embedding": "own", "silo": None}))
    with pytest.raises(ConfigError, match="this job makes tokenizers of its own"):
        begun(adapting(tiny, trained("glob"), "spec-opt", init={"embedding": "own"}))


def test_rows_of_another_tokenizer_are_refused_with_the_way_to_the_same(trained, tiny, tmp_path: Path):
    run = trained("glob")
    own = {"embedding": "own"}
    sources = [source.model_dump(mode="json", exclude_unset=True) for source in run.sources[:1]]
    with pytest.raises(VocabularyError, match=r'set tokenizer.kind = "file" and tokenizer.name = ') as found:
        train_here(adapting(tiny, run, init=own, sources=sources), lambda record: None)
    file = tokenizer_file(run)
    assert str(file) in str(found.value)
    job = adapting(tiny, run, at="same", init=own, sources=sources, tokenizer={"kind": "file", "name": str(file)})
    assert run_rounds(job).round == 3


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"layers": 2}}, r"model.layers = 2, there 1"),
        ({"model": {"width": 64}}, r"model.width = 64, there 32; model.mlp_width = 256, there 128"),
        ({"model": {"positions": 64}, "init": {"embedding": "own"}}, r"model.positions = 64, there 32"),
        ({"model": {"norm_eps": 1e-3}}, r"model.norm_eps = 0.001, there 1e-05"),
    ],
)
def test_another_model_is_refused_with_its_keys(trained, tiny, changes: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=rf"has another model \({told}\): copy its \[model\]"):
        begun(adapting(tiny, trained("glob"), **changes))


def test_a_random_embedding_may_have_more_positions(trained, tiny):
    job = begun(adapting(tiny, trained("glob"), model={"positions": 64}))
    assert opened(job).model.embedding.positions.shape == (64, 32)


def test_a_run_that_is_not_there_or_has_no_round_is_told(trained, tiny, tmp_path: Path):
    RunStore(tiny("glob", "empty"))
    with pytest.raises(ConfigError, match=r"init.run = 'tiny-glop': .*did you mean tiny-glob\?"):
        begun(tiny("std", "empty", name="adapted", init={"run": "tiny-glop"}))
    with pytest.raises(StoreError, match="no committed round yet: train first"):
        begun(tiny("std", "empty", name="adapted", init={"run": "tiny-glob"}))
    with pytest.raises(ConfigError, match="is this job's own run"):
        begun(tiny("std", "empty", name="tiny-glob", init={"run": "tiny-glob"}))


def test_settings_without_a_run_are_a_mistake(tiny):
    with pytest.raises(ConfigError, match=r"nothing is taken from another run without init.run"):
        tiny("std", init={"embedding": "own"})


# Going on.


def test_an_adaptation_that_was_stopped_goes_on_to_the_bit(trained, tiny):
    once, twice = (adapting(tiny, trained("spec"), at=at) for at in ("once", "twice"))
    run_rounds(once)
    run_rounds(twice, 1)
    assert last_round(run_folder(twice)) == 1
    run_rounds(twice)
    mine, theirs = (load_snapshot(next(silo_folder(job, "mixture").glob("000002-*")))[0] for job in (once, twice))
    for part, tensors in mine.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[part][name]), (part, name)
    scores = [read_records(run_folder(job) / "metrics.jsonl")[-1]["scores"] for job in (once, twice)]
    assert scores[0] == scores[1]


def test_once_it_has_begun_it_needs_the_other_run_no_more(trained, tiny, tmp_path: Path):
    copied = tmp_path / "copied"
    shutil.copytree(run_folder(trained("glob")), copied)
    job = tiny("isolated", "adapted", name="adapted", init={"run": str(copied)}, rounds={"choose": 1})
    run_rounds(job, 1)
    shutil.rmtree(copied)
    assert run_rounds(job).round == 3  # others' first round: they begin from the copied body
    altered = next((run_folder(job) / "origin").glob("body.safetensors"))
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="was altered"):
        fresh_body(job)


def test_a_run_that_has_changed_since_is_noticed(trained, tiny, tmp_path: Path):
    copied = tmp_path / "copied"
    shutil.copytree(run_folder(trained("glob")), copied)
    last = copied / "rounds" / "000003"
    aside = last.rename(tmp_path / "aside")
    job = adapting(tiny, trained("glob"), init={"run": str(copied)})
    run_rounds(job, 1)
    aside.rename(last)
    with pytest.raises(WrongRunError, match=r"init.fingerprint: .*; init.round: 2 there, 3 here"):
        run_rounds(job)
    second = job.model_copy(update={"init": job.init.model_copy(update={"round": 2})})
    assert run_rounds(second).round == 3


def test_nothing_is_taken_but_what_the_fingerprint_says(trained, tiny):
    taken = begun(adapting(tiny, trained("glob"))).init.fingerprint
    assert begun(adapting(tiny, trained("glob"), at="same", init={"fingerprint": taken})).init.fingerprint == taken
    with pytest.raises(ConfigError, match=r"init.fingerprint = 'abc': .* is '[0-9a-f]+': it was trained again since"):
        begun(adapting(tiny, trained("glob"), at="other", init={"fingerprint": "abc"}))


# Text that is held out.


def held_out(tiny: Callable[..., Job], method: str = "std", **changes: Any) -> Job:
    sources = tiny_sources(tiny)
    sources[-1]["held_out"] = True
    return tiny(method, "held-out", sources=sources, **changes)


def tiny_sources(tiny: Callable[..., Job]) -> list[dict[str, Any]]:
    return [s.model_dump(mode="json", exclude_unset=True) for s in tiny("std", "plain").sources]


def test_a_held_out_source_is_scored_and_never_trained_on(tiny):
    job = held_out(tiny)
    state = run_rounds(job)
    assert state.silos["mixture"].position.keys() == {"code", "latin"}
    for record in read_records(run_folder(job) / "metrics.jsonl"):
        assert record["scores"].keys() == {"code", "latin", "numbers"}
        assert [source for source, score in record["scores"].items() if score.get("held_out")] == [HELD_OUT]
        bits = {source: score["bits_per_byte"] for source, score in record["scores"].items()}
        assert record["mean"]["bits_per_byte"] == (bits["code"] + bits["latin"]) / 2
        assert record["mean_held_out"]["bits_per_byte"] == bits[HELD_OUT]


def test_it_changes_neither_the_tokenizer_nor_the_model_of_the_others(tiny):
    job = held_out(tiny)
    without = tiny("std", "without", sources=tiny_sources(tiny)[:-1])
    assert global_tokenizer_folder(job).name == global_tokenizer_folder(without).name
    run_rounds(job)
    run_rounds(without)
    assert torch.equal(body_of(job), body_of(without))
    mine, theirs = (corpus_folder(each, "latin", "global") / "tokenizer.json" for each in (job, without))
    assert mine.read_bytes() == theirs.read_bytes()
    assert (corpus_folder(job, HELD_OUT, "global") / "tokenizer.json").read_bytes() == theirs.read_bytes()


def test_it_needs_a_mixture_and_somebody_who_trains(tiny):
    with pytest.raises(ConfigError, match=r'sources.numbers.held_out = true: under method = "glob" no silo'):
        specs_of(held_out(tiny, "glob"))
    sources = [{**source, "held_out": True} for source in tiny_sources(tiny)]
    with pytest.raises(ConfigError, match="sources: all are held_out"):
        tiny("std", "nobody", sources=sources)


def test_adapting_says_what_text_that_nobody_trained_on_is_worth(trained, tiny):
    sources = tiny_sources(tiny)
    sources[-1]["held_out"] = True
    job = adapting(tiny, trained("spec-opt"), sources=sources)
    run_rounds(job)
    first, *_, last = read_records(run_folder(job) / "metrics.jsonl")
    assert np.isfinite(last["mean_held_out"]["perplexity"])
    assert last["mean"]["perplexity"] < first["mean"]["perplexity"]
