"""A Ray head for tests with all that people reach from elsewhere: dashboard, jobs, a token; on loopback."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from loopback import LOOPBACK
from nodes import until
from proxy import free_ports

import dept_ray

REPOSITORY = Path(dept_ray.__file__).parents[1]
STATE = """
import json, ray, time
from ray._private.state import actors
ray.init(address="auto", log_to_driver=False, logging_level=40)
for _ in range(TIMES):
    ours = [a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"]
    ours = [name for name in ours if name.rpartition(".")[2] in ("SiloActor", "CoordinatorActor")]
    free = ray.available_resources().get("CPU")
    if not ours and free == ray.cluster_resources()["CPU"]:
        break
    time.sleep(0.1)
print(json.dumps({"actors": ours, "free": free, "all": ray.cluster_resources()["CPU"]}))
"""


@dataclass
class Head:
    """A cluster of one node, and the environment of a person who has its token."""

    gcs: str
    url: str
    env: dict[str, str]

    def run(self, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *map(str, words)], env=self.env | env, cwd=REPOSITORY, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip

    def submit(self, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("dept_ray", "submit", *words, "--address", self.url, **env)

    def left(self, times: int = 100) -> dict[str, Any]:
        """Actors of ours and free CPUs: as they are once nothing is left, or after so many looks."""
        code = STATE.replace('"auto"', f'"{self.gcs}"').replace("TIMES", str(times))
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env | {"RAY_AUTH_MODE": "token"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def head_in(here: Path) -> Iterator[Head]:
    """A head with dashboard and token, whose own `dept_ray` cannot be imported; `here` is an empty folder."""
    (here / "token").write_text("a1" * 32)
    (here / "none" / "dept_ray").mkdir(parents=True)
    (here / "none" / "dept_ray" / "__init__.py").write_text("raise ImportError('this cluster has no dept_ray')")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    kept |= {
        **LOOPBACK, "RAY_AUTH_TOKEN_PATH": str(here / "token"),
        "OPENBLAS_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    gcs, dashboard, *others = free_ports(5)
    temporary = tempfile.mkdtemp(prefix="dr", dir="/tmp")  # sockets' paths must be short
    words = [
        "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}", "--num-cpus=4",
        f"--object-store-memory={200 << 20}", "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={others[0]}", f"--ray-client-server-port={others[1]}",
        f"--metrics-export-port={others[2]}", "--disable-usage-stats",
    ]  # fmt: skip
    with open(here / "log", "w") as log:
        env = kept | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(here / "none")}
        process = subprocess.Popen([sys.executable, *words], env=env, stdout=log, stderr=log, cwd=here)
    try:
        head = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", kept | {"PYTHONPATH": str(REPOSITORY)})
        until(lambda: process.poll() is not None or "Ray runtime started" in (here / "log").read_text(), 150)
        assert process.poll() is None, (here / "log").read_text()
        yield head
    finally:
        for pid in [process.pid, *below(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        rmtree(temporary, ignore_errors=True)


def below(pid: int) -> list[int]:
    """All that a process started, and they in turn."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [each for child in children for each in below(child)]
