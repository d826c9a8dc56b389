"""Which share of its time a silo computes behind a slow line: waiting for its orders, and making steps ahead of them.

The line has 100 Mbit/s each way and 100 ms there and back, for all silos together. What a silo computes is what it
trains, before its order came and after; the rest is reading, coding, writing, the line, and waiting for others. A step
lasts a quarter of a second whatever else the machine does (`overlap_run`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from sides import HERE, Ratio, options, say, tell

ALONE = ["unshare", "--net", "--map-root-user"]
SHAPES = {
    "full": {"silos": 2, "steps": 60, "ahead": 15, "ahead-int8": 5, "rounds": 5, "pace-s": 0.25},
    "small": {"silos": 2, "steps": 4, "ahead": 2, "ahead-int8": 1, "rounds": 4, "pace-s": 0.0},
}
BITS_PER_S, ROUND_TRIP_S = 100e6, 0.1


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """Two ratios."""
    shape = SHAPES[asked.size]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_folder:  # a socket's path must be short
        told = {
            "size": asked.size, "folder": asked.folder, **shape, "repeats": asked.repeats,
            "bits-per-s": BITS_PER_S, "round-trip-s": ROUND_TRIP_S,
        }  # fmt: skip
        options = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        runs = list[dict[str, Any]]()
        command = [*ALONE, sys.executable, str(HERE / "overlap_run.py"), *options]
        # Nobody else is in its namespace to ask for a token, and Ray's usual folder says which cluster is the latest.
        own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE, env=os.environ | own) as process:
            assert process.stdout is not None
            for line in process.stdout:
                runs.append(json.loads(line))
                say(line.strip())
        if process.returncode:
            raise SystemExit(process.returncode)
    waiting, *early = (
        [run for run in runs if (run["codec"], bool(run["ahead"])) == side]
        for side in (("fp32", False), ("fp32", True), ("int8", True))
    )
    for ahead in early:
        share, without = (statistics.median(run["share"] for run in side) for side in (ahead, waiting))
        yield Ratio(
            f"overlap, {ahead[0]['codec']}",
            f"share of its time that a silo computes at {BITS_PER_S / 1e6:.0f} Mbit/s and {1000 * ROUND_TRIP_S:.0f} "
            f"ms, {ahead[0]['ahead']} of {shape['steps']} steps ahead",
            share,
            ">= 0.95",
            share >= 0.95,
            {
                "without, in fp32": round(without, 3),
                "seconds of a round, without and with": [
                    round(statistics.median(run["round_s"] for run in side), 2) for side in (waiting, ahead)
                ],
                "of which, with": {
                    key: round(statistics.median(run[key] for run in ahead), 2)
                    for key in ahead[0]
                    if key.endswith("_s")
                },
                "bytes of a round": int(ahead[0]["sent_bytes"]),
            },
        )


if __name__ == "__main__":
    tell(options(__doc__ or "", repeats=1).parse_args(), bench)
