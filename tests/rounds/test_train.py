"""The whole loop on a tiny real job: the seven methods train, what is private stays home, and rates, draws and scores
follow the rounds. Stopped and gone on with: test_resume."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lives import run
from ordeals import timeless
from safetensors.torch import load_file
from tiny import SOURCES, ready_job, write_texts

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.methods import METHODS
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState, fresh_state
from dept_ray.silo.inner import cosine
from dept_ray.silo.snapshot import silo_folder


class RecordingPool(LocalPool):
    """Keeps every message, as it was when it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[RoundOrder] = []
        self.updates: list[SiloUpdate] = []

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        self.orders += orders.values()
        answers = super().run_round(orders, deadline, meanwhile)
        self.updates += [answer for answer in answers.values() if isinstance(answer, SiloUpdate)]
        return answers


@dataclass
class Finished:
    """A run from its first round to its last, and every message of it."""

    job: Job
    pool: RecordingPool
    state: RunState
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> Callable[[str], Finished]:
    """`finished(method)`: its tiny job trained once for this module; to be read only."""

    @functools.cache
    def train_once(method: str) -> Finished:
        job = ready_job(prepared, tmp_path_factory.mktemp(method), method, rounds={"keep": 9})
        pool = RecordingPool()
        return Finished(job, pool, *run(job, pool=pool))

    return train_once


# ------------------------------------------------------------------------------------------------ the seven methods


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_learns(finished, method):
    state, records = finished(method).state, finished(method).records
    assert [record["event"] for record in records] == ["round"] * 3 + ["scores"]
    losses = [record["loss"] for record in records[:-1]]
    assert losses[-1] < losses[0]
    figures = [
        figure
        for record in records
        for score in [*record["scores"].values(), record["mean"]]
        for figure in score.values()
    ]
    assert all(math.isfinite(figure) for figure in figures)
    assert records[-1]["mean"]["bits_per_byte"] < records[0]["mean"]["bits_per_byte"]
    assert all(sorted(record["scores"]) == list(SOURCES) for record in records)
    facts = METHODS[method]
    assert (state.body is not None, state.rows is not None) == (facts.share_body, facts.share_rows != "none")
    assert (
        sum(silo.tokens for silo in state.silos.values()) == records[-2]["tokens"] == 3 * 4 * 4 * 32 * len(state.silos)
    )


def test_glob_is_trim_where_every_source_uses_the_whole_vocabulary(tiny):
    outer = {"preset": "nesterov", "rows_momentum": 0.5}
    glob, glob_records = run(tiny("glob", at="glob", outer=outer))
    trim, trim_records = run(tiny("trim", at="trim", outer=outer, tokenizer={"vocabulary": "global"}))
    assert sorted(glob.tensors) == ["body", "body_momentum", "rows", "rows_momentum"]
    assert all(torch.equal(trim.tensors[name], tensor) for name, tensor in glob.tensors.items())
    assert [r["scores"] for r in trim_records] == [r["scores"] for r in glob_records]


def test_trim_leaves_rows_that_no_source_uses_where_they_were_drawn(finished):
    trim = finished("trim")
    cards = {name: silo.card() for name, silo in trim.pool.silos.items()}
    start = fresh_state(trim.job, METHODS["trim"], cards).rows
    used = np.unique(np.concatenate([card.rows_of(len(start)) for card in cards.values()]))
    unused = np.setdiff1d(np.arange(len(start)), used)
    assert len(unused) > 100
    assert torch.equal(trim.state.rows[unused], start[unused])
    assert (trim.state.rows[used] != start[used]).any(1).all()


def test_one_silo_averaged_with_itself_is_plain_training(tiny, prepared):
    """theta + (local - theta) is local but for two roundings of a last bit a round, 6e-8 of each value; AdamW's steps
    follow the gradients, so three rounds of them keep 1e-5; bit for bit is not to be had. With a Llama body: the biases
    of GPT-2's keys have no gradient but rounding, which AdamW blows up to steps of full size."""
    one: dict[str, Any] = {"sources": write_texts(prepared / "text")[:1], "model": {"arch": "llama"}}
    averaged, records = run(tiny("spec", at="averaged", inner={"optimizer_state": "keep"}, **one))
    alone, plain = run(job := tiny("isolated", at="alone", **one))
    body = load_file(silo_folder(job, "code") / alone.silos["code"].snapshot / "body.safetensors")["flat"]
    torch.testing.assert_close(averaged.body, body, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([r["loss"] for r in records[:-1]], [r["loss"] for r in plain[:-1]], rtol=1e-5)
    assert records[0]["loss"] == plain[0]["loss"]  # nothing has been averaged yet


@pytest.mark.parametrize("method", ["spec", "std"])
def test_muon_is_another_run_and_goes_on_from_its_momentum(tiny, method):
    inner = {"optimizer": "muon", "optimizer_state": "keep"}
    _, adamw = run(tiny(method, at="adamw", inner={"optimizer_state": "keep"}))
    expected, whole = run(tiny(method, at="whole", inner=inner))
    job = tiny(method, at="halves", inner=inner)
    run(job, stop_after=1)
    state, resumed = run(job)
    assert [r.get("loss") for r in resumed] == [r.get("loss") for r in whole]
    assert [r.get("loss") for r in whole] != [r.get("loss") for r in adamw]
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_optimizer_state_kept_or_reset_are_different_runs(tiny):
    keep, _ = run(tiny("spec", at="keep", inner={"optimizer_state": "keep"}))
    reset, _ = run(tiny("spec", at="reset"))
    assert not torch.equal(keep.body, reset.body)


# ------------------------------------------------------------------------------------------------ what stays home


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_messages_hold_what_the_method_shares_and_nothing_else(finished, method):
    ran, facts = finished(method), METHODS[method]
    cards = {name: silo.card() for name, silo in ran.pool.silos.items()}
    updates = [update for update in ran.pool.updates if update.steps]
    assert len(updates) == 3 * len(cards)
    assert len(ran.pool.orders) == len(ran.pool.updates) == 4 * len(cards)  # the last only score
    body = 0 if ran.state.body is None else ran.state.body.numel()
    for message in [*ran.pool.orders, *updates]:
        mine = cards[message.silo].vocabulary_size + ran.job.positions
        expected = {"body": (body,)} if facts.share_body else {}
        if facts.share_rows != "none":
            expected["rows"] = (mine, ran.job.model.width)
        assert arrays_of(message) == expected
    assert all(arrays_of(update) == {} for update in ran.pool.updates if not update.steps)
    for card in cards.values():
        assert arrays_of(card) == ({"owned_rows": (card.vocabulary_size,)} if facts.share_rows == "owned" else {})
        assert (card.global_vocabulary_size > 0) == (facts.share_rows != "none")
    rows = 32 * sum(card.vocabulary_size + 32 for card in cards.values()) if facts.share_rows != "none" else 0
    each_way = 4 * (len(cards) * body + rows)
    assert [record["sent_bytes"] for record in ran.records[:-1]] == [{"down": each_way, "up": each_way}] * 3


@pytest.mark.parametrize("method", ["glob", "trim", "spec"])
def test_how_often_a_text_has_its_tokens_is_told_where_rows_are_shared_and_it_counts(tiny, method):
    job = tiny(method, outer={"row_weights": "uses"})
    pool = LocalPool()
    state, records = run(job, pool=pool)
    for name, card in pool.cards.items():
        corpus, shared = pool.silos[name].corpora[name], METHODS[method].share_rows != "none"
        assert (card.row_uses is not None) == shared
        if card.row_uses is not None:
            rows = corpus.counts if card.owned_rows is None else corpus.counts[card.owned_rows]
            np.testing.assert_allclose(card.row_uses, rows / corpus.train.tokens, atol=1e-9)
            assert card.row_uses.min() > 0, "a row that nobody uses is all owners'"
    halves = tiny(method, at="halves", outer={"row_weights": "uses"})
    run(halves, stop_after=1)
    resumed, again = run(halves)
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert timeless(again) == timeless(records)
    if method != "spec":
        plain, _ = run(tiny(method, at="plain"))
        assert not torch.equal(plain.tensors["rows"], state.tensors["rows"])


def arrays_of(message: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of whatever in a message could hold a row: every array and every long sequence, however deep."""
    found: dict[str, tuple[int, ...]] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, np.ndarray | torch.Tensor):
            found[name] = tuple(value.shape)
        elif isinstance(value, dict):
            for key, inner in value.items():
                look(f"{name}.{key}", inner)
        elif dataclasses.is_dataclass(value):
            for key, inner in vars(value).items():
                look(f"{name}.{key}".removeprefix("."), inner)
        elif isinstance(value, str | bytes | list | tuple):
            assert len(value) < 100, f"{name} holds {len(value)} items"

    look("", message)
    return found


@pytest.mark.parametrize("method", ["spec", "spec-opt", "isolated"])
def test_the_run_folder_holds_no_row_either(finished, method):
    """Of a private embedding not even the shape is in the shared folder; the silo's own storage has it all."""
    ran = finished(method)
    for path in Path(ran.job.folder).glob("runs/**/*.safetensors"):
        assert path.stem == "body"
        assert load_file(path)["body"].shape == ran.state.body.shape
    for name, silo in ran.state.silos.items():
        embedding = load_file(silo_folder(ran.job, name) / silo.snapshot / "embedding.safetensors")
        assert embedding["tokens"].shape == (ran.pool.silos[name].vocabulary.size, ran.job.model.width)


# ------------------------------------------------------------------------------------------------ over rounds


def test_act_draws_its_tokens_anew_each_round_and_keeps_the_rest(tiny):
    """With a rate of nearly nothing, what a snapshot holds is what was drawn."""
    inner = {"lr": 1e-12, "local_steps": 1}
    found: dict[str, list[torch.Tensor]] = {}
    for method in ("std", "act"):
        job = tiny(method, at=method, inner=inner, rounds={"keep": 9})
        run(job)
        folder = silo_folder(job, "mixture")
        snapshots = [load_file(path / "embedding.safetensors") for path in sorted(folder.iterdir())]
        found[method] = [snapshot["tokens"] for snapshot in snapshots]
        for snapshot in snapshots:
            torch.testing.assert_close(snapshot["positions"], snapshots[0]["positions"], rtol=0, atol=1e-9)
    for tokens in found["std"]:
        torch.testing.assert_close(tokens, found["std"][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["act"][0], found["std"][0], rtol=0, atol=1e-9)  # the first round is not a re-draw
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(found["act"][i].flatten(), found["act"][j].flatten())[0, 1]) < 0.05
        assert found["act"][j].std() == pytest.approx(0.02, rel=0.05)


def test_act_forgets_the_moments_of_its_tokens_and_of_nothing_else(finished):
    act = finished("act")
    moments = load_file(silo_folder(act.job, "mixture") / "000002-0-0" / "optimizer.safetensors")
    steps = {name.removesuffix(".step"): int(value) for name, value in moments.items() if name.endswith(".step")}
    assert steps == {"matrices": 12, "vectors": 12, "positions": 12, "tokens": 4}


def test_a_silo_that_skipped_rounds_takes_the_rate_of_the_global_step(tiny):
    job = tiny("spec", rounds={"total": 6, "choose": 1}, inner={"optimizer_state": "keep"})
    pool = RecordingPool()
    state, records = run(job, pool=pool)
    orders = [order for order in pool.orders if order.steps]
    assert [order.first_step for order in orders] == [0, 4, 8, 12, 16, 20]
    skipped = [silo for silo in state.silos.values() if 0 < silo.rounds < 6]
    assert skipped
    for order in orders:  # its text, on the other hand, goes on from where the silo itself was
        before = [earlier for earlier in orders if earlier.silo == order.silo and earlier.round < order.round]
        assert order.position == {order.silo: 16 * len(before)}
        assert order.after == (f"{before[-1].round:06d}-0-0" if before else None)
    last = {order.silo: order for order in orders}
    for name, order in last.items():
        expected = cosine(order.first_step + 3, steps=24, warmup=2, peak=1e-2, floor=0.1)
        silo = pool.silos[name]
        assert [group.lr for group in silo._learner.optimizer.groups] == [expected] * 4
    assert [record["step"] for record in records[:-1]] == [4, 8, 12, 16, 20, 24]


def test_a_silo_that_was_never_chosen_is_still_scored_at_the_end(tiny):
    _, records = run(tiny("isolated", rounds={"total": 1, "choose": 1}))
    assert list(records[0]["scores"]) == list(records[0]["silos"])
    assert sorted(records[-1]["scores"]) == list(SOURCES)


def test_scores_come_every_so_many_rounds_and_at_the_end(tiny):
    _, records = run(tiny("std", rounds={"total": 3, "score_every": 2}))
    assert ["scores" in record for record in records] == [True, False, True, True]
    _, records = run(tiny("std", at="never", rounds={"total": 2, "score_every": 0}))
    assert ["scores" in record for record in records] == [False, False, True]
