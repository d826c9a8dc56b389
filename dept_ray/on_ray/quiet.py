"""Ray Data's manners, seen to before its first dataset: in order, bounded, without bars, no burden to a silo's node.

Settings are per process. Two actors of its own are per cluster, and their place is chosen here.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.remote_fn import CACHED_FUNCTIONS
from ray.data._internal.stats import get_or_create_stats_actor


def quiet_ray_data() -> None:
    """Blocks in order (the same bits every time), no progress bars, no chatter, no node with a GPU on its account.

    A dataset that keeps a cluster busy for ten seconds asks the autoscaler for one more node of each type there may be,
    but for those that its limits exclude.
    """
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(gpu=0)
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)


def house_ray_data_here() -> None:
    """Let Ray Data's two actors live on this node, from now on and for all datasets of the cluster.

    They outlive every run, where the first dataset was made: on a silo's node, which would then never be idle, and
    cost money until someone sees it.
    """
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()


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
