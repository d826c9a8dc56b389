"""Ray Data's settings, per process, made before its first dataset: in order, bounded, and without bars of its own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext
from ray.data._internal.remote_fn import CACHED_FUNCTIONS


def quiet_ray_data() -> None:
    """Blocks in order (the same bits every time), no progress bars, no chatter."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
