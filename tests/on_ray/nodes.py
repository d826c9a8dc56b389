"""Ray for tests, on loopback: of one node, or of several that can be killed, frozen and told to go."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import loopback  # noqa: F401 - before Ray is loaded, also outside pytest

QUICK_CHECKS = {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}  # fmt: skip
"""A frozen node is dead after some two seconds instead of a minute; for tests only."""

POD = """
import json, sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams

node = Node(RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=True)
while not node.dead_processes():
    time.sleep(1)
"""


def connect(**options: Any) -> None:
    """Make this process a driver, quietly."""
    import ray

    from dept_ray.on_ray.cluster import NAMESPACE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)


def until(fact: Callable[[], bool], within_s: float = 600) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


class Nodes:
    """A cluster whose nodes can be killed, frozen and told to go. Each silo has a node, told by a label."""

    def __init__(self, cluster: Any, store_bytes: int) -> None:
        self.cluster, self.store_bytes = cluster, store_bytes
        self.home: dict[str, Any] = {}
        """By silo: the node that is its own now."""
        self.pods: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, silo: str, **more: Any) -> None:
        # What ends its processes when this one ends is a signal handler, which only the main thread can set.
        self.cluster._shutdown_at_exit = threading.current_thread() is threading.main_thread()
        self.home[silo] = self.cluster.add_node(
            wait=False, num_cpus=1, labels={"silo": silo},
            object_store_memory=self.store_bytes, **more,
        )  # fmt: skip

    def add_pod(self, silo: str) -> None:
        """A node as a pod is one: what `ray start --block` makes, told of its end by SIGTERM.

        By that command itself a node cannot join on loopback.
        """
        about = {
            "gcs_address": self.cluster.address, "node_ip_address": "127.0.0.1", "min_worker_port": 0,
            "max_worker_port": 0, "num_cpus": 1, "labels": {"silo": silo}, "object_store_memory": self.store_bytes,
        }  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.pods[silo] = subprocess.Popen([sys.executable, "-c", POD, json.dumps(about)], **quiet)

    def end_pod(self, silo: str) -> None:
        self.pods[silo].terminate()

    def kill(self, silo: str) -> None:
        os.kill(self._raylet(silo), signal.SIGKILL)

    def freeze(self, silo: str, pid: int) -> None:
        """Node and silo stand still, as behind a network that fell silent."""
        os.kill(pid, signal.SIGSTOP)
        os.kill(self._raylet(silo), signal.SIGSTOP)

    def drain(self, silo: str) -> str:
        """The notice that precedes a preemption; the node goes on for now. Returns its id."""
        from dept_ray.on_ray.notices import drain

        node = self.home[silo].node_id
        drain(self.cluster.address, node, 60, "the spot price rose")
        return node

    def _raylet(self, silo: str) -> int:
        return self.home[silo].all_processes["raylet"][0].process.pid


@contextmanager
def cluster_of(*silos: str, store_bytes: int = 80 << 20) -> Iterator[Nodes]:
    """A head and a node for each silo, with an object store each; this process is on the head."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    head = {
        "num_cpus": 2, "include_dashboard": False,
        "object_store_memory": store_bytes + (20 << 20), "_system_config": QUICK_CHECKS,
    }  # fmt: skip
    nodes = Nodes(cluster := Cluster(initialize_head=True, head_node_args=head), store_bytes)
    try:
        for silo in silos:
            nodes.add(silo)
        cluster.wait_for_nodes()
        connect(address=cluster.address)
        yield nodes
    finally:
        ray.shutdown()
        for pod in nodes.pods.values():
            pod.kill()
            pod.wait()
        cluster.shutdown()
