"""Ray Data's manners, as its own code understands them. Where its actors live: test_autoscaling."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._common.usage.usage_lib import usage_stats_enabled
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler import (
    CLUSTER_AUTOSCALER_ENV_KEY,
    DefaultClusterAutoscalerV2,
    create_cluster_autoscaler,
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.cluster_autoscaler.util import cap_resource_request_to_limits
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

from dept_ray.on_ray.quiet import house_ray_data, quiet_ray_data


def test_a_dataset_asks_for_no_node_with_a_gpu() -> None:
    quiet_ray_data()
    limits = DataContext.get_current().execution_options.resource_limits
    small, with_gpu = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}
    assert cap_resource_request_to_limits([], [small, with_gpu], limits) == [small]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_dataset_asks_by_the_way_that_keeps_to_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's default asks for more of everything, whatever the limits."""
    monkeypatch.delenv(CLUSTER_AUTOSCALER_ENV_KEY, raising=False)
    quiet_ray_data()
    made = create_cluster_autoscaler({}, SimpleNamespace(), DataContext.get_current(), execution_id="any")
    assert type(made) is DefaultClusterAutoscalerV2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_what_a_killed_dataset_claimed_is_soon_free_and_what_a_living_one_claims_is_not() -> None:
    heard = dict[str, Any]()
    quiet_ray_data()
    DefaultClusterAutoscalerV2(
        SimpleNamespace(),  # type: ignore[arg-type]
        "any",
        autoscaling_coordinator=SimpleNamespace(request_resources=lambda **claim: heard.update(claim)),  # type: ignore[arg-type]
        get_node_counts=dict,
    )
    again_after_s = DefaultClusterAutoscalerV2.MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS
    assert 2 * again_after_s < heard["expire_after_s"] <= 30


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_the_actors_that_ray_data_finds_are_those_that_were_housed() -> None:
    """By whatever names it looks for them: else it makes its own, on a silo's node."""
    house_ray_data()
    before = ray.util.list_named_actors(all_namespaces=True)
    assert get_or_create_stats_actor() is not None
    assert get_or_create_autoscaling_coordinator() is not None
    if usage_stats_enabled():
        assert get_or_create_usage_collection_actor() is not None
    assert ray.util.list_named_actors(all_namespaces=True) == before
