"""Reaching Ray: start a local one when there is none, join the one that is named, and say early what it cannot hold."""

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as cluster_state

from dept_ray.config import Job
from dept_ray.errors import ClusterError
from dept_ray.on_ray.tokens import show_token
from dept_ray.rounds.methods import resources_of, silos_of, silos_per_round

NAMESPACE = "dept_ray"
AUTOSCALES = "autoscales"
"""The label of a head whose cluster brings nodes on demand (`clusters/`): Ray tells no driver whether it does."""
_REACH_TIMEOUT_S = 5.0


def connect(address: str | None = None, silos: int = 0, outlive: bool = False) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), else start a Ray of this process alone.

    Args:
        address: HOST:PORT, ray://HOST:PORT, auto, or local.
        silos: how many processes there will be, besides tasks.
        outlive: whether the cluster must outlive this process.

    Raises:
        ClusterError: nothing answers there.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Zero-GPU actors must not lose sight of what CUDA_VISIBLE_DEVICES says; Ray warns of the coming default otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address and address != "local":
        _check_reachable(address)
    elif outlive:
        raise ClusterError(
            "--detach leaves the run to a cluster, and a Ray of this command's own ends with it: "
            "start one with `ray start --head` and name it with --address (or RAY_ADDRESS)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if address and address != "local":
                ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            else:
                # Logical CPUs are for tasks, and Ray warns where there are many more processes than CPUs.
                ray.init(
                    address="local", namespace=NAMESPACE, num_cpus=max(2, os.cpu_count() or 2, silos),
                    include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise ClusterError(f"no Ray cluster at address {address!r}: {err}") from None
    except PermissionError as err:  # it writes the token of its first cluster there
        raise ClusterError(
            f"Ray cannot write {err.filename}: let HOME name a folder that can be written, or give it a token "
            "(RAY_AUTH_TOKEN) or RAY_AUTH_MODE=disabled"
        ) from None


def connected() -> bool:
    """Whether this process is on a cluster already."""
    return ray.is_initialized()


def leaving_nodes() -> set[str]:
    """Ids of nodes that were told to go: a preemption notice, a drain. No new work is placed on them."""
    # The one place where Ray tells it; its own trainer asks the same.
    return set(cluster_state.get_draining_nodes())


def _check_reachable(address: str) -> None:
    """Ray itself retries a wrong address for minutes; a port answers within seconds or not at all.

    Raises:
        ClusterError: nothing answers, or it does not let us in.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        if address == "auto":
            return
        raise ClusterError(f"Ray address {address!r} is not of the form HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S).close()
    except OSError as err:
        raise ClusterError(
            f"no Ray cluster answers at address {address!r} ({err}): check --address and RAY_ADDRESS, "
            "or leave both out to start a local Ray"
        ) from None
    show_token(f"{host}:{port}", _REACH_TIMEOUT_S)


def check_room(job: Job) -> None:
    """Refuse what the cluster cannot hold: see `check_nodes` and `check_lasting`.

    Raises:
        ClusterError: with what was asked and what there is.
    """
    check_lasting(job)
    check_nodes(job, [node for node in ray.nodes() if node["Alive"]])


def has_labels(node: dict[str, Any], wanted: dict[str, str]) -> bool:
    """Whether a node of `ray.nodes()` has these labels; of Ray's other forms, "!a" and "in(a, b)", it is believed."""
    have = node.get("Labels") or {}
    return all(have.get(key) == value for key, value in wanted.items() if not value.startswith(("!", "in(")))


def check_lasting(job: Job) -> None:
    """Refuse a folder in the copy of a working directory that Ray made for its job, and deletes after it.

    Raises:
        ClusterError: with the folder.
    """
    for folder in {str(job.storage_of(source.name)) for source in job.sources} | {job.folder}:
        if "working_dir_files" in Path(folder).parts:
            raise ClusterError(
                f"folder {folder} is this Ray job's own copy of its working directory, which ends with the job: name "
                "an absolute one that the cluster's nodes see, in the job file or with --folder"
            )


def check_nodes(job: Job, alive: list[dict[str, Any]]) -> None:
    """Refuse what nodes cannot hold: unknown labels, a silo larger than every node, more GPUs than there are.

    Where a node's label says that the cluster grows (`AUTOSCALES`), what is missing is a demand that may yet be met,
    and nothing is refused.

    Args:
        job: whose silos are to be placed.
        alive: nodes as `ray.nodes()` tells them.

    Raises:
        ClusterError: with what was asked and what there is.
    """
    if any(has_labels(node, {AUTOSCALES: "true"}) for node in alive):
        return
    nodes = [node["Resources"] for node in alive]
    wanted = {silo: resources_of(job, silo) for silo in silos_of(job)}
    for silo, resources in wanted.items():
        if not any(has_labels(node, resources.labels) for node in alive):
            raise ClusterError(
                f"silo {silo} asks for resources.labels = {resources.labels}, but no node of the cluster has them: "
                "start a node with these labels, or mend them in the job file"
            )
    for what, key in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
        largest = max((node.get(key, 0.0) for node in nodes), default=0.0)
        total = sum(node.get(key, 0.0) for node in nodes)
        for silo, resources in wanted.items():
            if getattr(resources, what) > largest:
                raise ClusterError(
                    f"silo {silo} asks for resources.{what} = {getattr(resources, what):g}, but no node has more "
                    f"than {largest:g}: lower it in the job file, or join a cluster that has such a node (--address)"
                )
        at_once = sum(getattr(resources, what) for resources in wanted.values())
        if at_once > total:
            raise ClusterError(
                f"{len(wanted)} silos ask for {at_once:g} of resources.{what}, but the cluster has {total:g}: "
                f"lower resources.{what} (fractions share a GPU), or join a larger cluster; "
                f"rounds.choose = {silos_per_round(job)} does not help, every silo keeps its place"
            )
