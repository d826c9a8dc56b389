"""A cluster that grows and shrinks on this machine: Ray's autoscaler (v2) with its provider of fake nodes, on loopback.

Real in it: the scheduler that meets demands with node types, nodes as processes of their own, their labels, and their
end. Not real: the cloud, and the GPUs. The launcher is our own, for Ray's `AutoscalingCluster` ends every Ray
process of the machine and reads a file that the wheel has not; this one ends what it started.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from head import below
from nodes import QUICK_CHECKS, connect, until
from proxy import free_ports

HEAD_ID = "f" * 51 + "00000"
"""The provider's own name for the head."""
IDLE_S = 6
"""An idle node goes after so long; less than a new one takes to be given its silo is too little."""


class FakeNodes:
    """A head, on which this process is, and nodes with a GPU each that come for silos, told by their labels."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self.pid = address, pid

    def alive(self) -> dict[str, list[str]]:
        """By silo, the ids of its nodes."""
        import ray

        homes: dict[str, list[str]] = {}
        for node in ray.nodes():
            if node["Alive"] and "silo" in node["Labels"]:
                homes.setdefault(node["Labels"]["silo"], []).append(node["NodeID"])
        return homes

    def ask_for(self, silo: str) -> None:
        """A task that needs such a node, and is over once it has it."""
        import ray

        task: Any = ray.remote(lambda: None)
        ray.get(task.options(num_gpus=1, label_selector={"silo": silo}).remote(), timeout=150)

    def kill(self, node: str) -> None:
        for pid in below(self.pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[0].endswith("/raylet") and f"--node_id={node}" in words:
                    os.kill(pid, signal.SIGKILL)
                    return
        raise AssertionError(f"node {node} has no raylet")


def cluster_file(gcs: str, silos: Collection[str]) -> dict[str, Any]:
    """What `ray up` would hand to the head: a node type for each silo's label, of which no node is there yet.

    Args:
        gcs: the head's address.
        silos: their names.
    """
    kinds = {
        silo: {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 << 20}, "labels": {"silo": silo},
            "min_workers": 0, "max_workers": 2, "node_config": {},
        }
        for silo in silos
    }  # fmt: skip
    head = {"resources": {"CPU": 2}, "labels": {"autoscales": "true"}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake", "max_workers": 8, "idle_timeout_minutes": IDLE_S / 60, "upscaling_speed": 8.0,
        "provider": {
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
            "launch_multiple": True, "gcs_address": gcs, "head_node_id": HEAD_ID,
        },
        "head_node_type": "ray.head.default", "available_node_types": {"ray.head.default": head, **kinds},
        # Which Ray looks up, and has no defaults for here.
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
        **{f"{what}_commands": [] for what in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
    }  # fmt: skip


@contextmanager
def fake_nodes(here: Path, silos: Collection[str]) -> Iterator[FakeNodes]:
    """A head, where this process is, and nodes that come when they are asked for; `here` is an empty folder."""
    import ray

    ray.shutdown()
    gcs, *others = free_ports(4)
    address = f"127.0.0.1:{gcs}"
    (here / "cluster.json").write_text(json.dumps(cluster_file(address, silos)))
    temporary = tempfile.mkdtemp(prefix="dr", dir="/tmp")  # sockets' paths must be short
    words = [
        "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--autoscaling-config={here / 'cluster.json'}", f"--temp-dir={temporary}", "--num-cpus=2", "--num-gpus=0",
        f"--object-store-memory={100 << 20}", "--labels=autoscales=true", "--include-dashboard=false",
        "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={others[0]}",
        f"--ray-client-server-port={others[1]}", f"--metrics-export-port={others[2]}", "--disable-usage-stats",
        f"--system-config={json.dumps(QUICK_CHECKS)}",
    ]  # fmt: skip
    env = os.environ | {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
    }  # fmt: skip
    with open(here / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *words], env=env, stdout=log, stderr=log, cwd=here)
    try:
        until(lambda: process.poll() is not None or "Ray runtime started" in (here / "log").read_text(), 150)
        assert process.poll() is None, (here / "log").read_text()
        connect(address=address)
        yield FakeNodes(address, process.pid)
    finally:
        ray.shutdown()
        for pid in [process.pid, *below(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        rmtree(temporary, ignore_errors=True)
