"""The toy jobs: one word apart, the same tokens of the same text, and the histories that their methods must have."""

from pathlib import Path

import pytest

from dept_ray.in_process import train_here
from dept_ray.jobfile import load_job
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import Record
from dept_ray.rounds.methods import METHODS
from dept_ray.study.plan import plan_job

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy jobs are run."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def histories(folder: Path) -> dict[str, list[Record]]:
    """Records of the seven toy jobs, in process."""
    found: dict[str, list[Record]] = {}
    for method in METHOD_NAMES:
        records: list[Record] = []
        train_here(load_job(JOBS / f"tiny_{method.replace('-', '_')}.toml", folder=str(folder)), records.append)
        found[method] = records
    return found


def test_every_job_file_is_a_job() -> None:
    for path in sorted(set(JOBS.glob("*.toml")) - set(JOBS.glob("study_*.toml"))):
        assert load_job(path).name == path.stem


@pytest.mark.slow
def test_the_seven_see_the_same_number_of_tokens(histories: dict[str, list[Record]]) -> None:
    assert {h[-2]["tokens"] for h in histories.values()} == {4 * 4 * 30 * 8 * 64}


@pytest.mark.slow
def test_every_method_learns(histories: dict[str, list[Record]]) -> None:
    for method, history in histories.items():
        losses = [r["loss"] for r in history if r["event"] == "round"]
        # A round under ACT begins with a new embedding, so its rounds do not build on each other at this size.
        assert losses[-1] < losses[0] - (0.0 if METHODS[method].reset_embedding else 0.2), method
        first, last = history[0]["mean"]["bits_per_byte"], history[-1]["mean"]["bits_per_byte"]
        assert last < 0.85 * first, method


@pytest.mark.slow
def test_bytes_are_those_that_the_plan_promised(histories: dict[str, list[Record]], folder: Path) -> None:
    sent = {m: sum(sum(r["sent_bytes"].values()) for r in h if r["event"] == "round") for m, h in histories.items()}
    for method in METHOD_NAMES:
        job = load_job(JOBS / f"tiny_{method.replace('-', '_')}.toml", folder=str(folder))
        plan = plan_job(job)
        assert sent[method] == 4 * (plan.round_bytes_down + plan.round_bytes_up), method
    assert sent["glob"] > sent["trim"] > sent["spec"] == sent["spec-opt"] > 0
    assert sent["std"] == sent["act"] == sent["isolated"] == 0


@pytest.mark.slow
def test_redrawing_embeddings_costs_at_first(histories: dict[str, list[Record]]) -> None:
    """ACT re-draws: its second round begins anew where STD's goes on."""
    assert histories["act"][1]["loss"] > histories["std"][1]["loss"]
