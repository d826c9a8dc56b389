"""What a run with regions has trained is used in a source's own region; elsewhere one is told the way there."""

import shutil
import threading
from pathlib import Path

import pytest
from tiny import document, tiny_job, write_texts

from dept_ray.client import Run
from dept_ray.errors import ShardError
from dept_ray.in_process import train_here
from dept_ray.rounds.agent import Agent, prepare_here
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.pool import LocalPool
from dept_ray.study.export import export

REGIONS = {"code": "us", "latin": "us", "numbers": "eu"}


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is over, in the coordinator's own folder; those of its regions are beside it."""
    beside = tmp_path_factory.mktemp("regions")
    tables = [
        {**table, "resources": {"labels": {"region": REGIONS[table["name"]]}}}
        for table in write_texts(prepared / "text")
    ]
    regions = {"mailbox": str(beside / "box"), "look_every_s": 0.01}
    job = tiny_job(beside / "here", sources=tables, rounds={"total": 1}, regions=regions)
    served = []
    for name in ("us", "eu"):
        box, labels, folder = Mailbox(str(beside / "box")), {"region": name}, beside / name
        for source in (source for source, region in REGIONS.items() if region == name):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            (folder / "data" / source).symlink_to(prepared / "data" / source)
        agent = Agent(box, labels, LocalPool, prepare_here, folder=str(folder))
        served.append(threading.Thread(target=agent.serve, args=(True, lambda seconds: None), daemon=True))
        served[-1].start()
    train_here(job, lambda record: None)
    for thread in served:
        thread.join(60)
    return Run.open(beside / "here" / "runs" / job.name)


@pytest.fixture(scope="module")
def in_eu(run: Run) -> Run:
    """Its folder, as it was copied into the region where the source `numbers` is at home."""
    there = run.folder.parents[2] / "eu" / "runs" / run.folder.name
    shutil.copytree(run.folder, there)
    return Run.open(there)


def test_where_it_was_coordinated_one_is_told_the_way_to_the_region(run: Run, tmp_path: Path) -> None:
    way = rf"source numbers is not at home here.*\(region=eu\). Copy {run.folder} to runs/tiny-spec-opt in"
    with pytest.raises(ShardError, match=way):
        run.score("numbers")
    with pytest.raises(ShardError, match=way):
        export(run.job, run.folder, tmp_path / "out", "numbers")
    for used in (run.score, lambda: run.sample("lorus "), lambda: run.score_text("lorus ")):
        with pytest.raises(ShardError, match=r"source code is not at home here.*with --source code"):
            used()


def test_in_the_region_it_is_scored_as_the_run_scored_it(run: Run, in_eu: Run) -> None:
    final = run.history()[-1]
    assert final["event"] == "scores"
    assert in_eu.score("numbers")["scores"] == {"numbers": final["scores"]["numbers"]}
    with pytest.raises(ShardError, match=r"source code is not at home here.*\(region=us\)"):
        in_eu.score()


def test_in_the_region_a_text_goes_to_the_likest_source_of_those_at_home(in_eu: Run, tmp_path: Path) -> None:
    assert in_eu.choose(document("latin", 0)).source == "numbers"
    assert "".join(in_eu.sample("seven hundred", tokens=5)) == "".join(in_eu.sample("seven hundred", "numbers", 5))
    assert (export(in_eu.job, in_eu.folder, tmp_path / "out", "numbers") / "model.safetensors").exists()
