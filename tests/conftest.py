"""What many tests share: the tiny job's text, prepared once per session under each kind of vocabulary."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before numpy is loaded: a thread of its own that waits for the next product takes a core of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import loopback  # noqa: F401 - before any test module loads Ray
import pytest
import torch
from tiny import ready_job, tiny_job

from dept_ray.config import Job
from dept_ray.preparing import prepare

STARTS_RAY = ("tests/on_ray/", "tests/study/test_bench.py", "tests/test_notebooks.py")
"""Tests that start a Ray, or several."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker has all tests that start a Ray, one after the other: they share one, and a machine."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else nodeid.partition("::")[0]

    return OneRay(config, log)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other on a shared machine make the smallest test take seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard() -> None:
    """A shell's background job ignores them, as do all that it starts: who waits for one would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """What survives a power cut is asked nowhere, and the tests write many thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _modules_are_no_garbage() -> None:
    """Each full collection would look through all that the libraries hold anew, about a fifth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny job's `text/`, and its `data/` under own tokenizers and under a global one."""
    folder = tmp_path_factory.mktemp("tiny")
    for method in ("spec-opt", "glob"):
        prepare(tiny_job(folder, method), local=True)
    return folder


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Callable[..., Job]:
    """`tiny(method, at="a", **overrides)`: a tiny job, ready to train, whose run has a folder of its own."""

    def make(method: str = "spec-opt", at: str = "run", **overrides: Any) -> Job:
        return ready_job(prepared, tmp_path / at, method, **overrides)

    return make
