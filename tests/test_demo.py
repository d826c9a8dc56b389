"""The demo's tables can be made for all seven methods; the demo itself, at full length, is what a newcomer runs."""

from pathlib import Path

import pytest
from rich.console import Console

from dept_ray import demo
from dept_ray.in_process import train_here
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import Record
from dept_ray.rounds.methods import METHODS


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [m if m in ("trim", "spec-opt", "std") else pytest.param(m, marks=pytest.mark.soak) for m in METHOD_NAMES]
)
def test_a_short_demo_of_each_method_ends_in_its_tables(method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "demo"  # the text is prepared once for all
    job = demo.demo_job(method, str(folder))
    steps = 40 if METHODS[method].mixed else 10
    less = {"max_bytes": 500_000, "max_validation_bytes": 10_000}
    job = job.model_copy(
        update={
            "sources": tuple(source.model_copy(update=less) for source in job.sources),
            "inner": job.inner.model_copy(update={"local_steps": steps}),
            "rounds": job.rounds.model_copy(update={"total": 2}),
        }
    )
    records: list[Record] = []
    train_here(job, records.append)
    console = Console(record=True, width=80, file=(Path(folder) / "out.txt").open("w"))
    console.print(demo.introduction(job), demo.summary(job, records))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "What was learnt: bits per byte of held-out text" in text
    assert ("times less" in text) == METHODS[method].share_body
    for source in ("cpp", "docs", "maths", "python"):
        assert records[-1]["scores"][source]["bits_per_byte"] < records[0]["scores"][source]["bits_per_byte"]


def test_the_same_number_of_tokens_whatever_the_method() -> None:
    tokens = {
        m: job.total_steps * (1 if METHODS[m].mixed else len(job.sources))
        for m in METHOD_NAMES
        if (job := demo.demo_job(m))
    }
    assert len(set(tokens.values())) == 1
