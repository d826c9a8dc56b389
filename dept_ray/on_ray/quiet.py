"""Ray Data's manners, seen to before its first dataset: in order, bounded, without bars, no burden to a silo's node.

Settings are per process. Some actors of its own are per cluster, and their place is chosen here.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray
from ray._common.usage.usage_lib import usage_stats_enabled
from ray.data import DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler import CLUSTER_AUTOSCALER_ENV_KEY
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2 import DefaultClusterAutoscalerV2
from ray.data._internal.remote_fn import CACHED_FUNCTIONS
from ray.data._internal.stats import STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE, _StatsActor
from ray.data._internal.usage.actor import _UsageCollectionActor

FORGET_AFTER_S = 30
"""How long the share of the cluster that a dataset claims outlives one that was killed; who lives claims it anew every
ten seconds."""


def quiet_ray_data() -> None:
    """Blocks in order (the same bits every time), no progress bars, no chatter, no node with a GPU on its account.

    By itself Ray Data asks the autoscaler, once a dataset has kept the cluster busy for some seconds, for twice the
    CPUs there are, whatever nodes bring them. Its older way (V2) asks for nodes by their shape, but for those beyond
    its limits. Both remember whoever was killed in the middle of a dataset for three minutes, for which it shares the
    CPUs with those that live: a run that was killed some times would wait so long for its text.
    """
    DefaultClusterAutoscalerV2.AUTOSCALING_REQUEST_EXPIRE_TIME_S = FORGET_AFTER_S
    os.environ.setdefault(CLUSTER_AUTOSCALER_ENV_KEY, "V2")
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(gpu=0)
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def house_ray_data() -> None:
    """Let Ray Data's own actors live on the cluster's head, whoever makes the first dataset; once per process.

    They outlive every run, and by Ray's own choice they live where the first dataset was made: on a silo's node, which
    would then never be idle, and cost money until someone sees it.
    """
    on_the_head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    found_by_name = {"get_if_exists": True, "lifetime": "detached"}
    stats: Any = _StatsActor
    stats.options(
        name=STATS_ACTOR_NAME, namespace=STATS_ACTOR_NAMESPACE, **on_the_head, **found_by_name
    ).remote()  # fmt: skip
    coordinator: Any = ray.remote(_AutoscalingCoordinatorActor)
    coordinator.options(
        name="AutoscalingCoordinator", namespace="AutoscalingCoordinator", max_restarts=-1, max_task_retries=-1,
        **on_the_head, **found_by_name,
    ).remote()  # fmt: skip
    if usage_stats_enabled():  # else there is none
        usage: Any = ray.remote(_UsageCollectionActor)
        usage.options(
            name="DataUsageCollectionActor", namespace="DataUsageCollectionActor", **on_the_head, **found_by_name
        ).remote()


@contextmanager
def leaving_no_task_behind() -> Iterator[None]:
    """Forget the remote functions of the datasets that are made and drained inside.

    Ray Data keeps one for each operator that ever was (its cache has the operator's own label in its key): 20 kB of
    Python objects a dataset, which nobody will ask for again, and a silo makes a dataset for each window of its text.
    """
    known = set(CACHED_FUNCTIONS)
    try:
        yield
    finally:
        for key in CACHED_FUNCTIONS.keys() - known:
            del CACHED_FUNCTIONS[key]
