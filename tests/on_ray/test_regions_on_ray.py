"""Two Ray clusters as regions, another that only coordinates, and nothing between them but letters in one place."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from head import REPOSITORY, below
from lives import relive
from nodes import until
from ordeals import lost_of, same_ledger, same_state, smallest
from proxy import through
from s3 import s3_server, uri
from test_coordinator import ordeal_of
from tiny import write_texts

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.rounds.letters import Mailbox
from dept_ray.rounds.mailbox import RUN

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REGIONS = {"code": "us", "latin": "us", "numbers": "eu"}
PACE: dict[str, Any] = {
    "inner": {"local_steps": 100}, "rounds": {"total": 500, "keep": 2},
    "faults": {"quorum": 0.3, "attempts": 99, "failures": 99, "patience_s": 1, "start_timeout_s": 300},
}  # fmt: skip


@dataclass
class Way:
    """How letters go: the mailbox as the job names it, as region eu reaches it, and what cuts eu off."""

    here: str
    eu: str
    cut: Callable[[], None]
    mend: Callable[[], None]


@contextmanager
def by_bucket(folder: Path) -> Iterator[Way]:
    """Over an S3 server, which eu reaches through a port that can be closed."""
    with s3_server() as port, through(port) as way:
        yield Way(uri(port, "run"), uri(way.port, "run"), way.cut, way.mend)


@contextmanager
def by_folder(folder: Path) -> Iterator[Way]:
    """Through a folder, which eu reaches by a link; cut, that leads to itself: all that is asked of it is an error."""
    box, link = folder / "box", folder / "link"

    def lead(to: Path) -> None:
        (new := folder / "new").symlink_to(to)
        new.replace(link)

    lead(box)
    yield Way(str(box), str(link), lambda: lead(link), lambda: lead(box))


class Region:
    """A `dept-ray region` with a Ray of its own."""

    def __init__(self, name: str, mailbox: str, log: Path) -> None:
        self.words = ["region", "--mailbox", mailbox, "--labels", f"region={name}", "--leave"]
        self.log = log
        self.start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dept_ray", *self.words], env=kept | {"PYTHONPATH": str(REPOSITORY)},
                cwd=self.log.parent, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def kill_when(self, missed: Callable[[], bool]) -> None:
        """Kill it while somebody waits for it: it stands still until it is missed, or proves to have been done."""
        self._signal(signal.SIGSTOP)
        while not missed():
            self._signal(signal.SIGCONT)
            time.sleep(0.3)
            self._signal(signal.SIGSTOP)
        self.kill()

    def _signal(self, number: int) -> None:
        """To the whole region: its agent, its silos, its Ray."""
        for pid in [self.process.pid, *below(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def regions(way: Way, folder: Path) -> Iterator[dict[str, Region]]:
    started = {"us": Region("us", way.here, folder / "us.log"), "eu": Region("eu", way.eu, folder / "eu.log")}
    try:
        yield started
    finally:
        for region in started.values():
            region.kill()


def mailed(prepared: Path, folder: Path, mailbox: str) -> Job:
    """Each source's text and snapshots stay in its region's own folder; the coordinator's has neither."""
    folder.mkdir(exist_ok=True)
    sources = [
        {**table, "storage": str(folder / name), "resources": {"labels": {"region": name}}}
        for table in write_texts(prepared / "text")
        for name in (REGIONS[table["name"]],)
    ]
    settings = {"mailbox": mailbox, "look_every_s": 0.3, "silent_s": 6.0}
    return smallest(prepared, folder / "here", "spec-opt", sources=sources, regions=settings, **PACE)


@pytest.mark.parametrize(
    ("by", "killed"), [pytest.param(by_bucket, "us", id="by bucket"), pytest.param(by_folder, "eu", id="by folder")]
)
def test_a_region_is_cut_off_for_two_rounds_and_one_is_killed_in_mid_round(
    prepared, tmp_path, monkeypatch, ray_here,
    by: Callable[[Path], AbstractContextManager[Way]], killed: str,
):  # fmt: skip
    its_silos = {silo for silo, region in REGIONS.items() if region == killed}
    with by(tmp_path) as way:
        job, box = mailed(prepared, tmp_path, way.here), Mailbox(way.here)
        with regions(way, tmp_path) as there:
            run = Run.start(job)

            def rounds() -> list[dict[str, Any]]:
                assert not run.status().over, run.status()
                return [record for record in run.history() if record["event"] == "round"]

            def wait(fact: Any) -> None:
                until(fact, 240)

            wait(lambda: any(len(record["silos"]) == 3 for record in rounds()))
            way.cut()
            before_the_cut = len(rounds())  # us may have begun alone
            wait(lambda: sum("numbers" not in record["silos"] for record in rounds()[before_the_cut:]) >= 2)
            way.mend()
            mended = len(rounds())
            wait(lambda: any(len(record["silos"]) == 3 for record in rounds()[mended:]))

            def missed() -> bool:
                since = len(rounds())
                wait(lambda: len(rounds()) >= since + 3 or refused_since(since))
                return refused_since(since)

            def refused_since(since: int) -> bool:
                return any(set(record["refused"]) == its_silos for record in rounds()[since:])

            before = box.read(f"{killed}/beat")["agent"]
            there[killed].kill_when(missed)
            without = len(rounds())
            run.pause()
            there[killed].start()
            wait(lambda: (box.read(f"{killed}/beat") or {"agent": before})["agent"] != before)
            wait(lambda: set(box.read(f"{killed}/beat")["ready"]) == its_silos)
            run.resume()
            wait(lambda: any(len(record["silos"]) == 3 for record in rounds()[without:]))

            run.set("rounds.total", run.status().round + 3)
            until(lambda: run.status().over, 120)
            assert run.status().phase == "finished", run.status().error
            for region in there.values():  # they were told to leave with the run
                assert region.process.wait(60) == 0, region.log.read_text()
            assert box.names() == [RUN]
            run.kill()

    ordeal = ordeal_of(run, job)
    lost = [(record["round"], record["refused"]) for record in ordeal.rounds if record["refused"]]
    silences = ["region eu has been silent" in told.get("numbers", "") for _, told in lost]
    assert sum(silences) >= 1 + (killed == "eu"), lost
    assert any(set(told) == its_silos for _, told in lost), lost
    ordeal.lost.update(lost_of(ordeal.records))
    reference = relive(ordeal, smallest(prepared, tmp_path / "reference", "spec-opt", **PACE), monkeypatch)
    same_state(ordeal, reference)
    same_ledger(ordeal, reference)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["data", "runs"]
    assert sorted(path.name for path in (tmp_path / "eu").iterdir()) == ["data", "silos"]
