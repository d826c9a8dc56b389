"""A silo is "after snapshot X" or it makes itself so; its answer depends on its order and on nothing it did before."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dept_ray.config import Job
from dept_ray.draws import fingerprint_of
from dept_ray.errors import ShardError, SiloError, StoreError, VocabularyError
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.methods import METHODS
from dept_ray.rounds.pool import specs_of
from dept_ray.rounds.state import fresh_state
from dept_ray.rounds.train import orders_for
from dept_ray.silo.silo import Silo
from dept_ray.silo.snapshot import silo_folder
from dept_ray.text.prepare import corpus_folder


@pytest.fixture
def open_silo() -> Iterator[Callable[[Job], Silo]]:
    """The first silo of a job."""
    opened: list[Silo] = []

    def make(job: Job) -> Silo:
        opened.append(Silo(job, next(iter(specs_of(job).values()))))
        return opened[-1]

    yield make
    for silo in opened:
        silo.stream.close()


def first_order(job: Job, silo: Silo, **change: Any) -> RoundOrder:
    cards = {silo.spec.silo: silo.card()}
    state = fresh_state(job, METHODS[job.method], cards)
    (order,) = orders_for(job, state, list(cards), cards, attempt=0, steps=job.inner.local_steps).values()
    return dataclasses.replace(order, **change)


def next_order(order: RoundOrder, update: SiloUpdate, **change: Any) -> RoundOrder:
    """What a coordinator with this one silo would order next (averaging: theta + delta)."""
    body = None if order.body is None or update.body is None else order.body + update.body
    rows = None if order.rows is None or update.rows is None else order.rows + update.rows
    return dataclasses.replace(
        order, round=order.round + 1, first_step=order.first_step + order.steps, after=update.snapshot,
        position=update.position, body=body, rows=rows,
        fingerprint="" if body is None else fingerprint_of(body), **change,
    )  # fmt: skip


def assert_same(a: SiloUpdate, b: SiloUpdate) -> None:
    for field in dataclasses.fields(SiloUpdate):
        if field.name != "seconds":
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, field.name


# ------------------------------------------------------------------------------------------------ after X

CASES = [
    *((method, "reset") for method in METHOD_NAMES),
    *((method, "keep") for method in METHOD_NAMES if METHODS[method].share_body),
]


@pytest.mark.parametrize(("method", "optimizer_state"), CASES)
def test_who_ran_ahead_goes_back_to_the_snapshot_that_the_order_names(tiny, open_silo, method, optimizer_state):
    job = tiny(method, inner={"optimizer_state": optimizer_state, "local_steps": 2})
    silo = open_silo(job)
    first = first_order(job, silo)
    second = next_order(first, silo.obey(first))
    expected = silo.obey(second)
    silo.obey(next_order(second, expected, attempt=1))  # ahead: two rounds, of which the manifest knows one
    assert_same(silo.obey(second), expected)
    assert_same(open_silo(job).obey(second), expected)  # and on another machine


@pytest.mark.parametrize("method", ["spec", "std"])
def test_an_order_after_nothing_begins_afresh(tiny, open_silo, method):
    job = tiny(method, inner={"local_steps": 2})
    silo = open_silo(job)
    order = first_order(job, silo)
    expected = silo.obey(order)
    silo.obey(next_order(order, expected))
    assert_same(silo.obey(order), expected)


def test_scoring_alone_changes_nothing_and_saves_nothing(tiny, open_silo):
    job = tiny("spec", inner={"optimizer_state": "keep"})
    silo, untouched = open_silo(job), open_silo(tiny("spec", at="other", inner={"optimizer_state": "keep"}))
    order = first_order(job, silo)
    second = next_order(order, silo.obey(order))
    untouched.obey(order)
    scored = silo.obey(dataclasses.replace(second, steps=0))
    assert (scored.snapshot, scored.tokens, scored.body, scored.rows) == (None, 0, None, None)
    assert math.isnan(scored.loss)
    assert [path.name for path in silo_folder(job, "code").iterdir()] == ["000000-0-0"]
    assert_same(silo.obey(second), untouched.obey(second))


def test_a_failed_round_is_forgotten(tiny, open_silo):
    """A reader that breaks in the middle: the next attempt starts from the snapshot, not from half a round."""
    job = tiny("spec", inner={"optimizer_state": "keep"})
    silo = open_silo(job)
    order = first_order(job, silo)
    second = next_order(order, silo.obey(order))
    batches = silo.stream.batches

    def broken(position: Any, steps: int) -> Iterator[np.ndarray]:
        yield from batches(position, 2)
        raise ShardError("the disk went away")

    silo.stream.batches = broken
    with pytest.raises(ShardError):
        silo.obey(second)
    silo.stream.batches = batches
    assert_same(silo.obey(second), open_silo(job).obey(second))


def test_a_failure_in_the_middle_of_a_step_leaves_no_gradient_behind(tiny, open_silo):
    job = tiny("spec", inner={"micro_batch": 2})
    silo = open_silo(job)
    order, loss_of, calls = first_order(job, silo), silo._rank.trainees.copy.loss_of, iter(range(100))

    def fails_once(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:  # the second half of the second step
            raise MemoryError
        return loss_of(ids, targets)

    silo._rank.trainees.copy.loss_of = fails_once
    with pytest.raises(MemoryError):
        silo.obey(order)
    assert_same(silo.obey(order), open_silo(job).obey(order))


def test_a_snapshot_that_is_gone_is_told(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    order = first_order(job, silo)
    with pytest.raises(StoreError, match=r"snapshot .*000041-0-0 cannot be read"):
        silo.obey(dataclasses.replace(order, after="000041-0-0"))
    assert silo.obey(order).steps == 4  # and it is still good for a sound order


# ------------------------------------------------------------------------------------------------ what is ordered


def test_an_altered_body_is_refused(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    order = first_order(job, silo)
    assert order.body is not None
    altered = order.body.copy()
    altered[17] += 1e-6
    with pytest.raises(SiloError, match=r"silo code: the body of round 0 arrived altered"):
        silo.obey(dataclasses.replace(order, body=altered))


def test_a_body_of_another_model_is_refused(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    short = np.zeros(10, np.float32)
    with pytest.raises(SiloError, match=rf"ordered a body of \(10,\), mine has {len(silo.body)} values"):
        silo.obey(first_order(job, silo, body=short, fingerprint=fingerprint_of(short)))


def test_an_order_s_arrays_are_only_read(tiny, open_silo):
    """Ray hands out read-only views of its store."""
    job = tiny("trim")
    silo = open_silo(job)
    order = first_order(job, silo)
    for array in (order.body, order.rows):
        assert array is not None
        array.flags.writeable = False
    update = silo.obey(order)
    assert update.body is not None
    assert update.body_norm == pytest.approx(float(np.linalg.norm(update.body.astype(np.float64))), rel=1e-6)


def test_a_delta_is_local_minus_global(tiny, open_silo):
    job = tiny("trim")
    silo = open_silo(job)
    order = first_order(job, silo)
    update = silo.obey(order)
    local = np.concatenate([silo.model.embedding.tokens.detach(), silo.model.embedding.positions.detach()])
    np.testing.assert_array_equal(update.body, silo.body.numpy() - order.body)
    np.testing.assert_array_equal(update.rows, local - order.rows)


# ------------------------------------------------------------------------------------------------ stopping


def stop_before_batch(silo: Silo, number: int, round: int, attempt: int) -> None:
    """Ask it to stop while it reads its batch of that number."""
    batches = silo.stream.batches

    def asking(position: Any, steps: int) -> Iterator[np.ndarray]:
        for i, batch in enumerate(batches(position, steps)):
            if i == number:
                silo.stop(round, attempt)
            yield batch

    silo.stream.batches = asking


@pytest.mark.parametrize("method", ["spec", "trim", "std"])
def test_who_is_asked_to_stop_hands_in_what_it_has(tiny, open_silo, method):
    job = tiny(method, inner={"local_steps": 4})
    silo, short = open_silo(job), open_silo(tiny(method, at="short", inner={"local_steps": 4}))
    order = first_order(job, silo)
    stop_before_batch(silo, 2, round=0, attempt=0)
    update = silo.obey(order)
    assert (update.steps, update.tokens) == (2, 2 * 4 * 32)
    assert sum(update.position.values()) == 2 * 4
    assert_same(update, short.obey(dataclasses.replace(order, steps=2)))  # as if no more had been ordered
    following = next_order(order, update)
    assert_same(silo.obey(following), short.obey(following))  # which reads on where it stopped


def test_a_request_to_stop_an_earlier_attempt_is_not_heard(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    stop_before_batch(silo, 1, round=0, attempt=0)
    assert silo.obey(dataclasses.replace(first_order(job, silo), attempt=1)).steps == 4


def test_a_request_that_comes_late_takes_no_later_one_back(tiny, open_silo):
    """Calls to an actor whose arguments are on their way are overtaken by others."""
    job = tiny("spec")
    silo = open_silo(job)
    silo.stop(0, 1)
    silo.stop(0, 0)
    assert silo.obey(dataclasses.replace(first_order(job, silo), attempt=1)).steps == 1


def test_a_request_that_comes_early_is_heard_by_the_round_that_it_means(tiny, open_silo):
    """Who was left behind in one round is asked to hand in the next, which it has not begun."""
    job = tiny("spec")
    silo = open_silo(job)
    order = first_order(job, silo)
    silo.stop(1, 0)
    update = silo.obey(order)
    assert update.steps == 1  # nobody waits for more of it
    assert silo.obey(next_order(order, update)).steps == 1
    assert silo.obey(dataclasses.replace(next_order(order, update), round=2)).steps == 4


# ------------------------------------------------------------------------------------------------ opening


def test_a_source_smaller_than_a_batch_is_told(tiny):
    job = tiny("spec", inner={"batch_size": 4096})
    with pytest.raises(
        SiloError, match=r'"code" has \d+ blocks of 32 tokens.*inner\.batch_size = 4096.*lower inner\.batch_size'
    ):
        Silo(job, specs_of(job)["code"])


def test_a_source_shorter_than_the_context_is_told(tiny):
    job = tiny("spec", inner={"context": 1_000_000}, model={"positions": 1_000_000})
    told = r'"code" has no whole block .*: inner\.context = 1,000,000, .* is [\d,]+ tokens; lower inner\.context'
    with pytest.raises(SiloError, match=told):
        Silo(job, specs_of(job)["code"])


def test_a_source_that_is_not_prepared_is_told(tiny):
    job = tiny("spec")
    elsewhere = job.model_copy(update={"folder": job.folder + "-elsewhere"})
    with pytest.raises(ShardError, match=r"code.*run `dept-ray prepare`"):
        Silo(elsewhere, specs_of(elsewhere)["code"])


def test_a_silo_starts_where_every_silo_starts(tiny, open_silo):
    """theta_0 is one for all; phi_0 of a silo's own is drawn from its name."""
    job = tiny("isolated")
    a = open_silo(job)
    b = Silo(job, specs_of(job)["latin"])
    for silo in (a, b):
        silo.obey(first_order(job, silo, steps=0))
    b.stream.close()
    assert torch.equal(a.body, b.body)
    assert not torch.equal(a.model.embedding.tokens[:20], b.model.embedding.tokens[:20])


def test_a_silo_s_card_tells_its_sources_and_their_tokens(tiny, open_silo):
    job = tiny("std")
    card = open_silo(job).card()
    assert (card.silo, card.sources, card.vocabulary_size) == ("mixture", ("code", "latin", "numbers"), 300)
    assert set(card.fingerprints) == set(card.train_tokens) == set(card.sources)
    assert (corpus_folder(job, "code", "global") / "index.json").exists()
    assert card.hardware == "cpu, 1 thread, fp32"


def test_a_loss_is_told_in_the_round_that_it_is_of_alone(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    order = first_order(job, silo)
    update = silo.obey(order)
    silo._say("training", order, loss=9.9)
    silo._say("saving", order)
    assert silo.status.loss == 9.9
    silo.obey(next_order(order, update))  # too short for anybody to be told its loss
    assert math.isnan(silo.status.loss)


def test_a_text_of_which_a_trimmed_vocabulary_has_not_all_is_told_with_the_piece(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    (source,) = silo.spec.sources
    silo.obey(first_order(job, silo, steps=0))
    with pytest.raises(VocabularyError, match=rf"the text holds 'Q', 'Z', which source {source} never does.*leave"):
        silo.score_text(source, "xZQ")


def test_a_silo_says_what_it_does(tiny, open_silo):
    job = tiny("spec")
    silo = open_silo(job)
    assert silo.status.doing == "waiting"
    said: list[str] = []
    say = silo._say

    def listen(doing: str, order: RoundOrder, **more: float) -> None:
        said.append(doing)
        say(doing, order, **more)

    silo._say = listen
    update = silo.obey(first_order(job, silo))
    assert said == ["loading", "scoring", "training", "saving", "waiting"]
    assert sorted(update.seconds) == ["code", "load", "save", "score", "train"]
