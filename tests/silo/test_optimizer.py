"""Given the same gradients, the optimizers are torch's own to the bit, and go on from their moments."""

import math

import pytest
import torch

from dept_ray.silo.optimizer import AdamW, Group, Muon, Optimizer, l2_norm

SHAPES = [(12, 4), (4, 16), (5, 5)]
SIZE = sum(map(math.prod, SHAPES))


def matrices_of(flat: torch.Tensor) -> list[torch.Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in SHAPES]), SHAPES, strict=True)]


class Twins:
    """Our optimizer on a flat tensor of matrices and on a table, and copies of both for torch's."""

    def __init__(self, kind: str) -> None:
        draw = torch.Generator().manual_seed(0)
        self.flat, self.table = torch.randn(SIZE, generator=draw), torch.randn(30, 4, generator=draw)
        self.matrices = [torch.nn.Parameter(m.clone()) for m in matrices_of(self.flat)]
        self.rows = torch.nn.Parameter(self.table.clone())
        self.flat.grad, self.table.grad = torch.zeros_like(self.flat), torch.zeros_like(self.table)
        self.draw, self.kind = draw, kind
        self.ours = self.fresh()
        self.theirs: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([self.rows], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
        ]
        if kind == "muon":
            self.theirs.append(torch.optim.Muon(self.matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        else:
            self.theirs.append(
                torch.optim.AdamW(self.matrices, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
            )

    def fresh(self) -> Optimizer:
        matrices, table = Group("matrices", self.flat, 0.1), Group("tokens", self.table, 0.0)
        if self.kind == "muon":
            return Muon(matrices, SHAPES, AdamW([table], (0.9, 0.95), 1e-8))
        return AdamW([matrices, table], (0.9, 0.95), 1e-8)

    def step(self, lr: float) -> None:
        assert self.flat.grad is not None
        assert self.table.grad is not None
        self.flat.grad += torch.randn(SIZE, generator=self.draw)
        self.table.grad += torch.randn(30, 4, generator=self.draw)
        for mine, theirs in zip(matrices_of(self.flat.grad), self.matrices, strict=True):
            theirs.grad = mine.clone()
        self.rows.grad = self.table.grad.clone()
        for group in self.ours.groups:
            group.lr = lr
        for optimizer in self.theirs:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        self.ours.step()
        self.ours.zero_grad()

    def same(self) -> bool:
        pairs = zip(matrices_of(self.flat), self.matrices, strict=True)
        return all(torch.equal(a, b) for a, b in pairs) and torch.equal(self.table, self.rows)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_are_torch_s_to_the_bit(kind: str) -> None:
    twins = Twins(kind)
    for lr in (1e-2, 2e-2, 0.0, 1e-3):
        twins.step(lr)
        assert twins.same()
    assert not twins.flat.grad.any()
    assert [tensor is mine for tensor, mine in zip(twins.ours.tensors, (twins.flat, twins.table), strict=True)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_one_that_is_given_the_moments_goes_on_with_them(kind: str) -> None:
    twins = Twins(kind)
    twins.step(1e-2)
    moments = {group: {k: v.clone() for k, v in kept.items()} for group, kept in twins.ours.moments.items()}
    assert sorted(moments["matrices"]) == (["momentum"] if kind == "muon" else ["exp_avg", "exp_avg_sq", "step"])
    twins.ours = twins.fresh()
    for group, kept in moments.items():
        twins.ours.moments.setdefault(group, {}).update(kept)
    for lr in (2e-2, 1e-2):
        twins.step(lr)
        assert twins.same()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_one_that_forgets_begins_like_a_fresh_one_in_the_same_memory(kind: str) -> None:
    one, other = Twins(kind), Twins(kind)
    one.step(1e-2)
    other.step(1e-2)
    where = {(group, key): v.data_ptr() for group, kept in one.ours.moments.items() for key, v in kept.items()}
    one.ours.forget()
    other.ours = other.fresh()
    assert not one.ours.moments
    for lr in (2e-2, 1e-2):
        one.step(lr)
        other.step(lr)
        assert torch.equal(one.flat, other.flat)
        assert torch.equal(one.table, other.table)
    assert where == {(group, key): v.data_ptr() for group, kept in one.ours.moments.items() for key, v in kept.items()}


@pytest.mark.parametrize("shape", [(1,), (4096,), (5000, 3), (3_000_001,)])
def test_a_norm_is_that_of_double_precision(shape: tuple[int, ...]) -> None:
    """A sum of three million squares in one go is 1e-4 too small on a CPU."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert l2_norm(values).item() == pytest.approx(values.double().norm().item(), rel=1e-6)
