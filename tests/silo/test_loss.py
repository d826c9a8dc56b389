"""The chunked loss is the plain one: same sum, same gradients, less memory."""

import pytest
import torch
import torch.nn.functional as F

from dept_ray.silo.loss import CHUNK_BYTES, IGNORED, chunk_rows, linear_cross_entropy, loss_of_chunk

N, V, D = 37, 101, 16


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = IGNORED
    return x, weight, targets


@pytest.mark.parametrize("rows", [1, 8, N, 1000, None])
def test_chunked_equals_plain_with_gradients(rows: int | None) -> None:
    x, weight, targets = problem()
    expected = plain(x, weight, targets)
    got = linear_cross_entropy(x, weight, targets, rows)
    assert got.shape == ()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got / 7, (x, weight)), torch.autograd.grad(expected / 7, (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, N])
def test_under_bf16_autocast_the_sum_is_fp32_and_gradients_are_nearer_to_exact_than_the_plain_ones(rows: int) -> None:
    x, weight, targets = problem()
    exact = torch.autograd.grad(plain(x, weight, targets) / 100, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x, weight, targets)
        got = linear_cross_entropy(x, weight, targets, rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(got / 100, (x, weight))
    theirs = torch.autograd.grad(expected / 100, (x, weight))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 1.02 * (other - true).norm()


def test_ignored_targets_count_for_nothing() -> None:
    x, weight, targets = problem()
    scored = targets != IGNORED
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, targets, 8), linear_cross_entropy(x[scored], weight, targets[scored], 8)
    )
    (x_grad,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 8), x)
    assert not x_grad[~scored].any()
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED), 8)
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, weight)[0].any()


def test_without_gradients_wanted_there_are_none() -> None:
    x, weight, targets = problem()
    with torch.no_grad():
        silent = linear_cross_entropy(x, weight, targets, 8)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, linear_cross_entropy(x, weight, targets, 8).detach())
    frozen = linear_cross_entropy(x, weight.detach(), targets, 8)
    frozen.backward()
    assert x.grad is not None
    assert weight.grad is None


def test_a_chunk_stays_within_its_bytes() -> None:
    for device in ("cpu", "cuda"):
        for vocabulary in (300, 8192, 50_257, 250_112, 10**9):
            rows = chunk_rows(vocabulary, device)
            assert rows == 1 or 4 * rows * vocabulary <= CHUNK_BYTES[device]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler: of torch.jit
@pytest.mark.parametrize("wanted", ["both", "x", "nothing"])
def test_a_compiled_chunk_is_the_chunk(wanted: str) -> None:
    x, weight, targets = problem()
    if wanted != "both":
        weight = weight.detach()
    compiled = torch.compile(loss_of_chunk, dynamic=False)
    with torch.set_grad_enabled(wanted != "nothing"):
        got = linear_cross_entropy(x, weight, targets, rows=8, chunk=compiled)  # the last of five rows
        expected = linear_cross_entropy(x, weight, targets, rows=8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if wanted != "nothing":
        inputs = [part for part in (x, weight) if part.requires_grad]
        pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
