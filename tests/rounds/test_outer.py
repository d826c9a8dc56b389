"""The outer step is equations (1) to (4): torch's SGD bit for bit, the weighted mean by hand, rows that stay put."""

import itertools
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import a_card, an_answer

from dept_ray import draws
from dept_ray.codec import decoded, encode
from dept_ray.config import Job
from dept_ray.draws import fingerprint_of
from dept_ray.jobfile import parse_job
from dept_ray.messages import Held
from dept_ray.rounds import fold
from dept_ray.rounds.outer import body_step, nesterov, outer_step, weights_of
from dept_ray.rounds.state import RunState, SiloRecord

SILOS = ("a", "b", "c")
V, L, D, N = 12, 3, 4, 1000


def job_of(weights: dict[str, float] | None = None, **outer: object) -> Job:
    sources = [
        {"kind": "installed", "collection": "docs", "name": name, "weight": (weights or {}).get(name, 1.0)}
        for name in SILOS
    ]
    return parse_job({"name": "tiny", "sources": sources, "outer": outer})


def draw(shape: int | tuple[int, ...], *labels: int) -> np.ndarray:
    """Values whose sum depends on the order of summation."""
    rng = np.random.default_rng(labels)
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(np.float32)


def body_state(values: object = None) -> RunState:
    body = torch.from_numpy(draw(N, 0)) if values is None else torch.tensor(values, dtype=torch.float32)
    return RunState(0, {name: SiloRecord(position={name: 0}) for name in SILOS}, body)


def rows_state(seed: int = 0) -> RunState:
    return RunState(
        0, {name: SiloRecord(position={name: 0}) for name in SILOS}, rows=torch.from_numpy(draw((V + L, D), seed))
    )


OWNED = {"a": [0, 1, 2, 3, 4], "b": [0, 3, 4, 5, 9], "c": [0, 4, 9, 10]}
NOBODY_S, CARDS = [6, 7, 8, 11], {name: a_card(name, OWNED[name], V) for name in SILOS}


def rows_answers(owned: dict[str, list[int]], round: int = 0, tokens: tuple[int, ...] = (100, 250, 70)):
    return {
        name: an_answer(name, tokens[i], rows=draw((len(owned[name]) + L, D), 1, round, i))
        for i, name in enumerate(owned)
    }


# ------------------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize(("eta", "mu"), [(1.0, 0.0), (0.7, 0.9), (0.4, 0.5), (0.3, 0.0), (1.3, 0.99)])
def test_the_outer_step_is_torch_s_nesterov_bit_for_bit(eta, mu):
    job, state = job_of(lr=eta, momentum=mu), body_state()
    assert state.body is not None
    theta = torch.nn.Parameter(state.body.clone())
    sgd = torch.optim.SGD([theta], lr=eta, momentum=mu, nesterov=mu > 0)
    for round in range(5):
        answers = {name: an_answer(name, 100 * (i + 1), draw(N, 1, round, i)) for i, name in enumerate(SILOS)}
        state = outer_step(job, state, answers, CARDS)
        mean = torch.zeros(N)
        for i, name in enumerate(SILOS):
            mean.add_(torch.from_numpy(answers[name].body), alpha=(i + 1) / 6)
        theta.grad = -mean
        sgd.step()
        assert torch.equal(state.body, theta.detach())
        if mu:
            assert torch.equal(state.body_momentum, sgd.state[theta]["momentum_buffer"])
        else:
            assert state.body_momentum is None


def test_presets_are_the_paper_and_diloco():
    assert (job_of().outer.eta, job_of().outer.mu) == (1.0, 0.0)
    assert (job_of(preset="nesterov").outer.eta, job_of(preset="nesterov").outer.mu) == (0.7, 0.9)
    assert job_of(preset="nesterov", momentum=0.5).outer.mu == 0.5


def test_eta_one_and_mu_zero_is_the_average_of_the_bodies():
    rng = np.random.default_rng(0)
    start = rng.integers(-64, 64, N) / 8  # eighths and weights of powers of two: every operation is exact
    local = {name: rng.integers(-64, 64, N) / 8 for name in SILOS}
    answers = {
        name: an_answer(name, tokens, local[name] - start) for name, tokens in zip(SILOS, (256, 128, 128), strict=True)
    }
    after = outer_step(job_of(), body_state(start), answers, CARDS)
    average = local["a"] / 2 + local["b"] / 4 + local["c"] / 4
    np.testing.assert_array_equal(after.body, average.astype(np.float32))


def test_the_mean_is_weighted_by_tokens_really_trained():
    answers = {
        "a": an_answer("a", 100, [10, 0, 1]),
        "b": an_answer("b", 300, [2, 4, 1]),
        "c": an_answer("c", 600, [0, -1, 1]),
    }
    after = outer_step(job_of(), body_state([0, 0, 0]), answers, CARDS)
    np.testing.assert_allclose(after.body, [1.6, 0.6, 1.0], rtol=1e-6)  # 1 + .6 + 0; 0 + 1.2 - .6


def test_a_source_s_weight_multiplies_its_tokens():
    answers = {"a": an_answer("a", 100), "b": an_answer("b", 300), "c": an_answer("c", 50)}
    assert weights_of(job_of({"a": 3.0, "c": 4.0}), answers) == {"a": 300 / 800, "b": 300 / 800, "c": 200 / 800}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_body_longer_than_what_is_folded_at_a_time_makes_the_whole_step(codec, threads, monkeypatch):
    monkeypatch.setattr(draws, "PIECE", 32)
    monkeypatch.setattr(fold, "PIECE", 64)
    monkeypatch.setattr(fold, "_THREADS", threads)
    draw, size = np.random.default_rng(0), 40 * 64 + 7
    vectors = {name: draw.standard_normal(size).astype(np.float32) for name in "cabdefghij"}
    deltas = {name: v if codec == "fp32" else encode(v, codec)[0] for name, v in vectors.items()}
    weights = {name: 1 / (number + 2) for number, name in enumerate(vectors)}
    expected = torch.zeros(size)
    for name in sorted(deltas):
        expected.add_(torch.from_numpy(decoded(deltas[name])), alpha=weights[name])
    assert torch.equal(fold.weighted_mean(deltas, weights), expected)
    theta, m = torch.randn(size), torch.randn(size)
    for momentum in (m, None):
        *step, seen = body_step(deltas, weights, theta, momentum, eta=0.7, mu=0.9)
        for made, whole in zip(step, nesterov(theta, -expected, momentum, 0.7, 0.9), strict=True):
            assert torch.equal(made, whole)
        assert seen == fingerprint_of(step[0].numpy())


def test_of_a_thousand_silos_eight_deltas_are_in_memory():
    made, most = [], 0

    def fetch(value):
        nonlocal most
        delta = np.full(64, value, np.float32)
        made.append(weakref.ref(delta))
        most = max(most, sum(each() is not None for each in made))
        return delta

    answers = {f"s{i:03d}": replace(an_answer(f"s{i:03d}"), body=Held(partial(fetch, i))) for i in range(1000)}
    records = {name: SiloRecord(position={name: 0}) for name in answers}
    after = outer_step(job_of(), RunState(0, records, torch.zeros(64)), answers, {})
    np.testing.assert_allclose(after.body, np.full(64, 499.5), rtol=1e-5)
    assert most == 8


def test_only_those_who_answered_count():
    answers = {"a": an_answer("a", 100, [4, 0]), "c": an_answer("c", 300, [0, 4])}
    after = outer_step(job_of(), body_state([1, 1]), answers, CARDS)
    np.testing.assert_array_equal(after.body, np.float32([2, 4]))
    assert after.silos["b"] == SiloRecord(position={"b": 0})
    assert after.silos["a"] == SiloRecord("000000-0-0", {"a": 1}, rounds=1, tokens=100)
    assert after.round == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_who_answers_first_changes_no_bit(momentum):
    job = job_of(momentum=momentum, rows_momentum=momentum)
    state = RunState(0, {name: SiloRecord() for name in SILOS}, body_state().body, rows_state().rows)
    rows = rows_answers(OWNED)
    answers = {name: an_answer(name, 7 ** (i + 1), draw(N, 1, i), rows[name].rows) for i, name in enumerate(SILOS)}
    results = [
        outer_step(job, state, {name: answers[name] for name in order}, CARDS).tensors
        for order in itertools.permutations(SILOS)
    ]
    for result in results[1:]:
        assert all(torch.equal(result[name], tensor) for name, tensor in results[0].items())


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_nobody_reported_do_not_move(momentum):
    job, start = job_of(rows_momentum=momentum), rows_state()
    state = start
    for round in range(3):
        state = outer_step(job, state, rows_answers(OWNED, round), CARDS)
    assert start.rows is not None
    assert torch.equal(state.rows[NOBODY_S], start.rows[NOBODY_S])
    moved = sorted(set(range(V + L)) - set(NOBODY_S))
    assert (state.rows[moved] != start.rows[moved]).any(1).all()


def test_a_row_out_of_work_keeps_its_momentum_and_its_value():
    """Only b owns row 5: while b is away it stands still, and when b is back its momentum goes on from where it was."""
    job, state = job_of(rows_lr=0.7, rows_momentum=0.9), rows_state()
    first, second = rows_answers(OWNED, 0), rows_answers(OWNED, 2)
    state = after_first = outer_step(job, state, first, CARDS)
    without_b = {name: answer for name, answer in rows_answers(OWNED, 1).items() if name != "b"}
    state = outer_step(job, state, without_b, CARDS)
    assert torch.equal(state.rows[5], after_first.rows[5])
    assert torch.equal(state.rows_momentum[5], after_first.rows_momentum[5])
    assert not torch.equal(state.rows_momentum[0], after_first.rows_momentum[0])
    state = outer_step(job, state, second, CARDS)
    d0, d2 = (answers["b"].rows[OWNED["b"].index(5)] for answers in (first, second))
    np.testing.assert_allclose(state.rows_momentum[5], -(0.9 * d0 + d2), rtol=1e-5)


def test_a_row_is_averaged_over_its_owners_and_positions_over_all():
    start = rows_state()
    answers = rows_answers(OWNED, tokens=(100, 300, 600))
    after = outer_step(job_of(), start, answers, CARDS)
    moved = (after.rows - start.rows).numpy()
    a, b, c = (answers[name].rows for name in SILOS)
    at = {name: OWNED[name].index for name in SILOS}
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(start.rows.abs().max())}
    np.testing.assert_allclose(moved[1], a[at["a"](1)], **tolerance)
    np.testing.assert_allclose(moved[3], 0.25 * a[at["a"](3)] + 0.75 * b[at["b"](3)], **tolerance)
    np.testing.assert_allclose(moved[9], (b[at["b"](9)] + 2 * c[at["c"](9)]) / 3, **tolerance)
    np.testing.assert_allclose(moved[4], 0.1 * a[at["a"](4)] + 0.3 * b[at["b"](4)] + 0.6 * c[at["c"](4)], **tolerance)
    np.testing.assert_allclose(moved[V:], 0.1 * a[-L:] + 0.3 * b[-L:] + 0.6 * c[-L:], **tolerance)


def test_where_uses_count_a_row_is_averaged_by_how_often_each_owner_s_text_has_it():
    """a has token 3 thrice as often as b, of which c has most; nobody has token 4, and b alone token 9."""
    shares = {"a": {0: 0.5, 1: 0.2, 3: 0.3}, "b": {0: 0.7, 3: 0.1, 9: 0.2}, "c": {0: 0.9, 10: 0.1}}
    cards = {
        name: replace(card, row_uses=np.array([shares[name].get(row, 0.0) for row in OWNED[name]]))
        for name, card in CARDS.items()
    }
    start = rows_state()
    answers = rows_answers(OWNED, tokens=(100, 300, 600))
    moved = (outer_step(job_of(), start, answers, cards).rows - start.rows).numpy()
    a, b, c = (answers[name].rows for name in SILOS)
    at = {name: OWNED[name].index for name in SILOS}
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(start.rows.abs().max())}
    np.testing.assert_allclose(moved[3], (0.1 * 0.3 * a[at["a"](3)] + 0.3 * 0.1 * b[at["b"](3)]) / 0.06, **tolerance)
    np.testing.assert_allclose(moved[9], b[at["b"](9)], **tolerance)
    np.testing.assert_allclose(moved[10], c[at["c"](10)], **tolerance)
    assert not moved[4].any()
    np.testing.assert_allclose(moved[V:], 0.1 * a[-L:] + 0.3 * b[-L:] + 0.6 * c[-L:], **tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_glob_is_trim_in_which_all_own_all_rows(momentum):
    job = job_of(rows_momentum=momentum, rows_lr=0.8)
    everything = {name: list(range(V)) for name in SILOS}
    trim = {name: a_card(name, everything[name], V) for name in SILOS}
    glob = {name: a_card(name, None, V) for name in SILOS}
    by_trim = by_glob = rows_state()
    for round in range(3):
        answers = rows_answers(everything, round)
        by_trim, by_glob = outer_step(job, by_trim, answers, trim), outer_step(job, by_glob, answers, glob)
        assert all(torch.equal(by_glob.tensors[name], tensor) for name, tensor in by_trim.tensors.items())


def test_rows_have_an_outer_rate_of_their_own():
    """By default body goes with Nesterov and rows with the plain masked mean."""
    job, start = job_of(preset="nesterov"), rows_state()
    after = outer_step(job, start, rows_answers(OWNED), CARDS)
    plain = outer_step(job_of(), start, rows_answers(OWNED), CARDS)
    assert torch.equal(after.rows, plain.rows)
    assert after.rows_momentum is None


# ------------------------------------------------------------------------------------------------ the state


def test_the_old_state_is_not_changed():
    job = job_of(preset="nesterov", rows_momentum=0.9)
    rows = rows_answers(OWNED)
    answers = {name: an_answer(name, 10, draw(N, 1, i), rows[name].rows) for i, name in enumerate(SILOS)}
    state = RunState(0, {name: SiloRecord(position={name: 0}) for name in SILOS}, body_state().body, rows_state().rows)
    for _ in range(2):  # the second time there are momenta
        before = {name: tensor.clone() for name, tensor in state.tensors.items()}
        after = outer_step(job, state, answers, CARDS)
        assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())
        assert all(after.tensors[name].data_ptr() != tensor.data_ptr() for name, tensor in state.tensors.items())
        state = after


def test_where_nothing_is_shared_only_the_silos_records_move():
    state = RunState(4, {name: SiloRecord(position={name: 0}) for name in SILOS})
    after = outer_step(job_of(preset="nesterov"), state, {"b": an_answer("b", 64)}, CARDS)
    assert (after.round, after.tensors) == (5, {})
    assert after.silos["b"].tokens == 64
