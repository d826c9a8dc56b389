"""Ray Data's manners, as its own code understands them. Where its actors live: test_autoscaling."""

from ray.data import DataContext
from ray.data._internal.cluster_autoscaler.util import cap_resource_request_to_limits

from dept_ray.on_ray.quiet import quiet_ray_data


def test_a_dataset_asks_for_no_node_with_a_gpu() -> None:
    quiet_ray_data()
    limits = DataContext.get_current().execution_options.resource_limits
    small, with_gpu = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}
    assert cap_resource_request_to_limits([], [small, with_gpu], limits) == [small]
