"""Where preparing is tested: two sources, a job that reads them, and parts so small that there are several."""

from pathlib import Path
from typing import Any

import pytest
from two_sources import make_job, write_texts

from dept_ray.config import Job
from dept_ray.text import tasks

PART_BYTES = 4000


@pytest.fixture
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PART_BYTES", PART_BYTES)


@pytest.fixture
def texts(tmp_path: Path) -> list[dict[str, Any]]:
    return write_texts(tmp_path / "text")


@pytest.fixture
def job(texts: list[dict[str, Any]], tmp_path: Path) -> Job:
    return make_job(texts, tmp_path / "job")
