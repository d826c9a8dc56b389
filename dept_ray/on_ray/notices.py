"""The clouds' notices that a machine will be taken, turned into drains of its Ray node (`dept-ray watch-preemption`).

A cloud tells this through its metadata service, to the machine alone, and Ray does not listen. Nothing is stopped or
saved here: the pool sees that the node leaves (`cluster.leaving_nodes`), asks its silo to hand in what it has, and
places it elsewhere.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled, with no word of its types
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RpcError

from dept_ray.errors import ClusterError, ConfigError, nearest
from dept_ray.on_ray.cluster import connect

_ANSWERS_WITHIN_S = 2.0
_TOKEN = "X-aws-ec2-metadata-token"


@dataclass(frozen=True)
class Cloud:
    """How a cloud tells a machine that it will be taken."""

    metadata: str
    """URL of the metadata service, as a machine of that cloud sees it."""
    notice: str
    """Path of the notice there; an answer of 404 is none."""
    headers: Callable[[str], dict[str, str]]
    """Of the question, given the URL of the service."""
    seconds_left: Callable[[str], float | None]
    """From the answer; None: it is no notice."""
    look_every_s: float


def _a_token(metadata: str) -> dict[str, str]:
    return {_TOKEN: _ask(f"{metadata}/latest/api/token", {f"{_TOKEN}-ttl-seconds": "60"}, "PUT")}


def _until_its_time(answer: str) -> float:
    """Of `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`. What cannot be read is a notice all the same."""
    try:
        at = datetime.fromisoformat(json.loads(answer)["time"])
    except (ValueError, KeyError, TypeError):
        return 120.0
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - time.time()


CLOUDS = {
    # docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: two minutes, look each 5 s.
    "aws": Cloud(
        "http://169.254.169.254", "/latest/meta-data/spot/instance-action", _a_token, _until_its_time, look_every_s=5.0
    ),
    # cloud.google.com/compute/docs/instances/create-use-preemptible: 30 seconds, from when the answer is TRUE.
    "gcp": Cloud(
        "http://metadata.google.internal", "/computeMetadata/v1/instance/preempted",
        lambda metadata: {"Metadata-Flavor": "Google"},
        lambda answer: 30.0 if answer.strip() == "TRUE" else None,
        look_every_s=1.0,
    ),
}  # fmt: skip


def cloud_of(name: str) -> Cloud:
    """A cloud by its name.

    Raises:
        ConfigError: it is not known here.
    """
    try:
        return CLOUDS[name]
    except KeyError:
        raise ConfigError(f"--cloud {name}: unknown{nearest(name, list(CLOUDS))}") from None


def look(cloud: Cloud) -> float | None:
    """Seconds until this machine is taken; None: there is no notice.

    Raises:
        OSError, HTTPException: the metadata service does not answer.
    """
    try:
        return cloud.seconds_left(_ask(cloud.metadata + cloud.notice, cloud.headers(cloud.metadata)))
    except HTTPError as err:
        if err.code != 404:
            raise
        return None


def await_notice(cloud: Cloud) -> float:
    """Wait until this machine is told that it will be taken; the seconds that it has left.

    Raises:
        ClusterError: nothing answers at the first look.
    """
    try:
        left_s = look(cloud)
    except (OSError, HTTPException) as err:
        raise ClusterError(
            f"no metadata service answers at {cloud.metadata} ({err}): is this a machine of that cloud (--cloud), "
            "and does its container reach the service?"
        ) from None
    while left_s is None:
        time.sleep(cloud.look_every_s)
        with suppress(OSError, HTTPException):  # it is away for a moment now and then
            left_s = look(cloud)
    return left_s


def this_node(address: str) -> tuple[str, str]:
    """The Ray node of this machine: (address of its cluster, its id). Leaves the cluster again.

    Raises:
        ClusterError: there is none.
    """
    connect(address)
    try:
        context = ray.get_runtime_context()
        return context.gcs_address, context.get_node_id()
    finally:
        ray.shutdown()  # a node with a driver on it would never be idle


def drain(cluster: str, node: str, left_s: float, reason: str) -> None:
    """Tell Ray that a node will be taken: nothing new is placed there, and who lives there can see it.

    Args:
        cluster: address of Ray's GCS.
        node: its id.
        left_s: seconds until then.
        reason: for people.

    Raises:
        ClusterError: Ray cannot be reached, or refuses.
    """
    preemption = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # pyright: ignore[reportAttributeAccessIssue] - as above
    deadline_ms = int((time.time() + max(1.0, left_s)) * 1000)
    try:
        accepted, why = GcsClient(cluster).drain_node(node, preemption, reason, deadline_ms)
    except RpcError as err:
        accepted, why = False, str(err)
    if not accepted:
        raise ClusterError(f"Ray at {cluster} does not drain node {node}, which will be taken: {why}")


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    directly = build_opener(ProxyHandler({}))  # the service is this machine's own, whatever http_proxy says
    with directly.open(Request(url, headers=headers, method=method), timeout=_ANSWERS_WITHIN_S) as answer:
        return answer.read().decode()
