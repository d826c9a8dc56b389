"""Notices that a node will be taken: of clouds, whose metadata services are played on loopback, and of Kubernetes.

What follows one: test_autoscaling.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from metadata import Metadata, metadata_service
from nodes import cluster_of, until

from dept_ray.cli import main
from dept_ray.errors import ClusterError, ConfigError
from dept_ray.on_ray.cluster import leaving_nodes
from dept_ray.on_ray.notices import CLOUDS, Cloud, await_notice, cloud_of, look


@pytest.fixture
def service() -> Iterator[Metadata]:
    with metadata_service() as service:
        yield service


def of(service: Metadata, name: str) -> Cloud:
    return replace(cloud_of(name), metadata=service.url, look_every_s=0.01)


def give_notice(service: Metadata, left_s: float = 120) -> None:
    service.action = f'{{"action": "terminate", "time": "{datetime.now(UTC) + timedelta(seconds=left_s):%FT%TZ}"}}'
    service.preempted = True


@pytest.mark.parametrize("name", CLOUDS)
def test_no_notice_is_no_notice(service: Metadata, name: str) -> None:
    assert look(of(service, name)) is None


@pytest.mark.parametrize(("name", "left_s"), [("aws", 90), ("gcp", 30)])
def test_a_notice_says_how_long_is_left(service: Metadata, name: str, left_s: float) -> None:
    give_notice(service, left_s)
    assert look(of(service, name)) == pytest.approx(left_s, abs=5)


@pytest.mark.parametrize("action", ['{"action": "stop"}', "soon", '{"action": "stop", "time": "noon"}', "[]"])
def test_a_notice_that_cannot_be_read_is_a_notice(service: Metadata, action: str) -> None:
    service.action = action
    assert look(of(service, "aws")) == 120


def test_a_time_without_a_zone_is_universal(service: Metadata) -> None:
    service.action = f'{{"action": "hibernate", "time": "{datetime.now(UTC) + timedelta(seconds=60):%FT%T}"}}'
    assert look(of(service, "aws")) == pytest.approx(60, abs=5)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_service_that_is_away_for_a_moment_is_asked_again(service: Metadata, name: str) -> None:
    left: list[float] = []
    watcher = threading.Thread(target=lambda: left.append(await_notice(of(service, name))), daemon=True)
    watcher.start()
    assert service.asked.acquire(timeout=30)
    service.away = True
    for _ in range(3):
        assert service.asked.acquire(timeout=30)
    give_notice(service)
    service.away = False
    watcher.join(30)
    assert left


@pytest.mark.parametrize("name", CLOUDS)
def test_a_machine_of_no_such_cloud_is_told_so_at_once(service: Metadata, name: str) -> None:
    service.away = True
    with pytest.raises(ClusterError, match=f"no metadata service answers at {service.url}"):
        await_notice(of(service, name))


@pytest.mark.ray
def test_a_pod_that_is_told_to_end_is_leaving_and_stays_until_its_silo_has_moved() -> None:
    """By Ray's own handler of SIGTERM; what the pool does with a silo on a node that is leaving: test_nodes."""
    with cluster_of() as nodes:
        import ray

        class Lodger:
            def node(self) -> str:
                return ray.get_runtime_context().get_node_id()

        nodes.add_pod("latin")
        silo = ray.remote(num_cpus=1, label_selector={"silo": "latin"})(Lodger).remote()
        home = ray.get(silo.node.remote(), timeout=150)
        assert leaving_nodes() == set()
        nodes.end_pod("latin")
        until(lambda: leaving_nodes() == {home}, 60)
        assert ray.get(silo.node.remote(), timeout=60) == home
        assert nodes.pods["latin"].poll() is None
        ray.kill(silo)
        nodes.pods["latin"].wait(60)


def test_a_cloud_that_is_not_known_is_refused_before_anything_else() -> None:
    with pytest.raises(ConfigError, match=r"--cloud gpc: unknown; did you mean gcp\?"):
        cloud_of("gpc")
    said = CliRunner().invoke(main, ["watch-preemption", "--cloud", "azure"])
    assert (said.exit_code, "known: aws, gcp" in said.output) == (1, True)
