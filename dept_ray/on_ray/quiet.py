"""Ray Data's settings, per process, made before its first dataset: in order, bounded, and without bars of its own."""

import logging

from ray.data import DataContext


def quiet_ray_data() -> None:
    """Blocks in order (the same bits every time), no progress bars, no chatter."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
