"""Compiled before the first step, by one process before the others, and without a trace in the model."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dept_ray.sections import ModelSection
from dept_ray.silo.compiling import compile_now, compiled_loss, one_before_the_others
from dept_ray.silo.model import Body, Embedding, LanguageModel, initialise

ONE = """
import sys, time
from pathlib import Path
from dept_ray.silo.compiling import one_before_the_others
lock, notes, name = map(Path, sys.argv[1:])
(notes / f"at-{name}").touch()
with one_before_the_others(lock):
    (notes / f"in-{name}").touch()
    while not (notes / f"go-{name}").exists():
        time.sleep(0.02)
"""


@pytest.fixture
def model() -> LanguageModel:
    section = ModelSection(layers=2, width=16, heads=2)
    made = LanguageModel(Body(section), Embedding(50, section, 8))
    initialise(made, torch.Generator().manual_seed(0))
    return made


def test_the_first_pass_changes_nothing(model: LanguageModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append((ids.shape, torch.is_autocast_enabled("cpu")))
        return model.loss(ids, targets)

    compile_now(loss_of, list(model.parameters()), (2, 8), autocast=True)
    assert calls == [((2, 8), True)]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler: of torch.jit
def test_compiled_the_loss_is_the_loss(model: LanguageModel) -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    from torch._dynamo.utils import counters

    counters.clear()
    loss_of, parameters = compiled_loss(model), list(model.parameters())
    compile_now(loss_of, parameters, (2, 8), autocast=False)
    assert counters["stats"]["unique_graphs"] == 2, "one block for all, and a chunk of the loss"
    got, expected = loss_of(ids[:, :-1], ids[:, 1:]), model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_first_goes_alone_and_the_others_together(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", ONE, str(tmp_path / "lock"), str(tmp_path), name])

    def until(*names: str) -> None:
        while not all((tmp_path / name).exists() for name in names):
            time.sleep(0.02)

    first = start("first")
    until("in-first")
    others = [start(name) for name in ("second", "third", "killed")]
    until("at-second", "at-third", "at-killed")
    time.sleep(0.3)
    assert [file.name for file in tmp_path.glob("in-*")] == ["in-first"]
    others.pop().kill()  # who dies while it waits holds nobody up
    (tmp_path / "go-first").touch()
    until("in-second", "in-third")
    for name in ("second", "third"):
        (tmp_path / f"go-{name}").touch()
    assert [process.wait() for process in (first, *others)] == [0, 0, 0]


def test_nobody_waits_for_ever_for_one_who_stands_still(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a") as stands_still:
        fcntl.flock(stands_still, fcntl.LOCK_EX)
        with one_before_the_others(tmp_path / "lock", patience_s=0.2):
            pass
