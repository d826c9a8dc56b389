"""The cluster files say what Ray, its autoscaler and our jobs can use: read by Ray's own code, without a cloud."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray._private import ray_constants
from ray._private.label_utils import parse_node_labels_string
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from tiny import tiny_job

from dept_ray.cli import main
from dept_ray.errors import ClusterError
from dept_ray.on_ray.cluster import AUTOSCALES, check_nodes
from dept_ray.on_ray.notices import CLOUDS as CLOUDS_THAT_TELL
from dept_ray.on_ray.notices import cloud_of
from dept_ray.sections import FaultsSection, Resources

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
LAUNCHED = ("local.yaml", "one_node.yaml", "aws.yaml", "gcp.yaml")
CLOUDS = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay_cluster.yaml", "kuberay_job.yaml")
GROWING = (*CLOUDS, *KUBERAY)
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)  # type: ignore[union-attr]
README = (CLUSTERS / "README.md").read_text()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def ray_cluster(name: str) -> dict[str, Any]:
    """The RayCluster of a KubeRay file, as the API server would give it to the autoscaler."""
    told = read(name)
    spec = told["spec"] if told["kind"] == "RayCluster" else told["spec"]["rayClusterSpec"]
    return {"metadata": {"name": "dept", "namespace": "default"}, "spec": spec}


def autoscaling(name: str) -> dict[str, Any]:
    """What the autoscaler is run with."""
    if name in KUBERAY:
        return _derive_autoscaling_config_from_ray_cr(ray_cluster(name))
    return prepare_config(read(name))


def launched_for(name: str, labels: dict[str, str], gpus: float = 1, silos: int = 3) -> dict[str, int]:
    """Nodes that Ray's own scheduler would ask the cloud for, by type, on behalf of silos that find no place."""
    config = AutoscalingConfig(autoscaling(name), skip_content_hash=True)
    selector = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
    demand = ResourceRequestUtil.make({"GPU": gpus}, label_selectors=[selector] if selector else None)
    reply = ResourceDemandScheduler(event_logger=None).schedule(  # type: ignore[arg-type]
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([demand] * silos),
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


def containers(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, its Ray container) of a KubeRay file."""
    spec = ray_cluster(name)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group.get("groupName", "head"), group["template"]["spec"]["containers"][0]


def test_every_file_is_known_here():
    assert {path.name for path in CLUSTERS.iterdir()} == {
        *LAUNCHED,
        *KUBERAY,
        "README.md",
        "Dockerfile",
        "grafana.json",
    }
    for name in (*LAUNCHED, *KUBERAY):
        assert f"({name})" in README


# What Ray says.


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_it(name: str):
    config = prepare_config(read(name))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", KUBERAY)
def test_the_kubernetes_autoscaler_takes_it(name: str):
    config = autoscaling(name)
    validate_config(config)
    assert {"gpu-spot", "gpu-on-demand"} < set(config["available_node_types"])


def test_ray_refuses_a_key_that_no_node_type_has():
    config = read("aws.yaml")
    config["available_node_types"]["gpu-spot"]["spot"] = True
    with pytest.raises(ValidationError, match="'spot' was unexpected"):
        validate_config(prepare_config(config))


# What jobs ask for.


@pytest.mark.parametrize("name", GROWING)
def test_silos_without_labels_bring_spot_nodes_one_each(name: str):
    assert launched_for(name, {}) == {"gpu-spot": 3}


@pytest.mark.parametrize("name", GROWING)
def test_half_a_gpu_each_brings_half_the_nodes(name: str):
    assert launched_for(name, {}, gpus=0.5, silos=4) == {"gpu-spot": 2}


@pytest.mark.parametrize("name", GROWING)
def test_a_label_chooses_the_market(name: str):
    assert launched_for(name, {"market": "on-demand"}) == {"gpu-on-demand": 3}
    assert launched_for(name, {"market": "spot"}) == {"gpu-spot": 3}


@pytest.mark.parametrize("name", GROWING)
def test_a_label_that_no_type_has_brings_nothing(name: str):
    assert launched_for(name, {"region": "mars"}) == {}


@pytest.mark.parametrize("name", GROWING)
def test_every_label_of_a_type_may_be_asked_for(name: str):
    for kind, config in autoscaling(name)["available_node_types"].items():
        if config["resources"].get("GPU"):
            Resources(num_gpus=1, labels=config["labels"])
            assert set(config["labels"]) == {"region", "accelerator", "market"}
            assert launched_for(name, config["labels"], silos=1) == {kind: 1}


def test_labels_in_the_readme_are_labels_of_the_files():
    asked = [tomllib.loads(line)["resources"] for line in README.splitlines() if line.startswith("resources = {")]
    assert asked
    known = [kind["labels"] for name in GROWING for kind in autoscaling(name)["available_node_types"].values()]
    started = [line for name in LAUNCHED for line in (CLUSTERS / name).read_text().splitlines() if "--labels=" in line]
    for resources in asked:
        wanted = Resources.model_validate(resources).labels
        if "host" in wanted:
            assert any("host=$(hostname -s)" in line for line in started)
        else:
            assert any(wanted.items() <= labels.items() for labels in known)


@pytest.mark.parametrize("name", ["local.yaml", "one_node.yaml"])
def test_machines_of_your_own_start_with_labels(name: str):
    told = read(name)
    for role, also in (("head", "--head"), ("worker", "--address=")):
        for command in told[f"{role}_start_ray_commands"][1:]:
            assert also in command
            said = command.replace("$(hostname -s)", "box2")
            labels = re.search(r"--labels=(\S+)", said).group(1)  # type: ignore[union-attr]
            assert parse_node_labels_string(labels)["region"] == "here"


# Room that is not there yet.


@pytest.mark.parametrize("name", GROWING)
def test_a_head_alone_that_can_grow_refuses_no_silo(name: str, tmp_path: Path):
    job = tiny_job(tmp_path, "spec", resources={"num_gpus": 1, "labels": {"region": "eu"}})
    types = autoscaling(name)["available_node_types"]
    (head,) = (kind for kind in types.values() if AUTOSCALES in kind["labels"])
    check_nodes(job, [{"Resources": {"CPU": 8.0}, "Labels": head["labels"]}])
    with pytest.raises(ClusterError, match=r"resources.num_gpus = 1, but no node has more than 0"):
        check_nodes(job, [{"Resources": {"CPU": 8.0}, "Labels": {"region": "eu"}}])
    with pytest.raises(ClusterError, match="no node of the cluster has them"):
        check_nodes(job, [{"Resources": {"CPU": 8.0, "GPU": 3.0}, "Labels": {"region": "us"}}])


@pytest.mark.parametrize("name", GROWING)
def test_the_head_has_no_gpu_and_stays(name: str):
    config = autoscaling(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert not head["resources"].get("GPU")
    assert head["labels"]["market"] == "on-demand"
    assert head["labels"][AUTOSCALES] == "true"


@pytest.mark.parametrize("name", GROWING)
def test_nothing_with_a_gpu_is_kept_when_nobody_asks(name: str):
    for kind in autoscaling(name)["available_node_types"].values():
        assert kind.get("min_workers", 0) == 0


# Spot is spot.


def test_markets_are_what_their_labels_say():
    for kind, config in read("aws.yaml")["available_node_types"].items():
        spot = config["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (config["labels"]["market"] == "spot"), kind
    for kind, config in read("gcp.yaml")["available_node_types"].items():
        spot = config["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot == (config["labels"]["market"] == "spot"), kind
        if config["resources"].get("GPU"):
            assert config["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_listen_for_the_notice_of_their_cloud_once_ray_is_there(name: str):
    told = read(name)
    *before, last = told["worker_start_ray_commands"]
    assert any("ray start " in command for command in before)
    command, _, shell = last.removeprefix("nohup dept-ray ").partition(" < ")
    assert shell.endswith("&"), "nobody waits for it"
    asked, *options = shlex.split(command)
    options = main.commands[asked].make_context(asked, options).params
    assert cloud_of(options["name"]) == CLOUDS_THAT_TELL[told["provider"]["type"]]
    assert (options["address"], options["node"], options["metadata"]) == ("auto", None, None)


# One version, one folder.


@pytest.mark.parametrize("name", [*GROWING, "Dockerfile"])
def test_the_ray_in_the_image_is_the_ray_of_the_constraints(name: str):
    found = re.findall(r"(?:rayproject/ray|dept-ray):([0-9.]+)", (CLUSTERS / name).read_text())
    assert found
    assert set(found) == {RAY}
    if name in KUBERAY:
        assert ray_cluster(name)["spec"]["rayVersion"] == RAY


@pytest.mark.parametrize("name", CLOUDS)
def test_the_shared_folder_is_mounted_on_every_node_and_seen_in_its_container(name: str):
    config = read(name)
    assert any(" /mnt/dept" in command and "mount " in command for command in config["initialization_commands"])
    assert "-v /mnt/dept:/mnt/dept" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_whole(name: str):
    told, spec = read(name), ray_cluster(name)["spec"]
    assert told["apiVersion"] == "ray.io/v1"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert not spec["headGroupSpec"]["rayStartParams"].get("labels"), "Ray ignores labels there"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > 30
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert volumes == {mount["name"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
    for group, container in containers(name):
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests, group
        assert {"cpu", "memory"} <= set(limits)
        assert ("nvidia.com/gpu" in limits) == (group != "head")
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mnt/dept", "/dev/shm"}


@pytest.mark.parametrize("name", KUBERAY)
def test_a_pod_that_is_told_to_go_drains_by_a_key_that_ray_knows_and_has_the_time(name: str):
    for group in ray_cluster(name)["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (told,) = pod["containers"][0]["env"]
        assert hasattr(ray_constants, told["name"])
        assert FaultsSection().grace_s < float(told["value"]) < pod["terminationGracePeriodSeconds"]


def test_the_two_kubernetes_files_differ_in_the_job_alone():
    assert ray_cluster("kuberay_job.yaml") == ray_cluster("kuberay_cluster.yaml")
    job = read("kuberay_job.yaml")["spec"]
    assert job["entrypoint"].startswith("dept-ray train ")
    assert job["shutdownAfterJobFinishes"] is True
    assert job["activeDeadlineSeconds"] > job["ttlSecondsAfterFinished"]
