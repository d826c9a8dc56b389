"""Silos inside a real Ray run against the best bare loop: tokens per second, whole rounds counted.

One silo with all cores should reach 0.97 of it; four silos of one thread each should reach all of it together. What
is missing is told by where a round's seconds went. `--local` measures the same silo without Ray as well.
"""

import argparse
import os
import sys
import uuid
from collections.abc import Iterator

from bare import MALLOC
from reference import SIZES, job_of, training_tokens
from sides import HERE, Ratio, Side, options, taking_turns, tell

from dept_ray.preparing import prepare

TARGETS = {1: 0.97, 4: 1.0}


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """One ratio: all silos' tokens per second over the bare loop's."""
    size, silos = SIZES[asked.size], asked.silos
    steps = asked.steps or max(1, size.steps // silos)
    job = job_of(size, asked.folder, f"bench-{uuid.uuid4().hex[:8]}", silos, steps)
    prepare(job, local=True)
    common = ["--size", asked.size, "--steps"]
    bare = [HERE / "bare.py", *common, str(steps * silos), "--tokens", training_tokens(job)]
    ray = [HERE / "ray_run.py", *common, str(steps), "--folder", asked.folder, "--name", job.name]
    with taking_turns(
        asked.repeats,
        lambda: Side("bare loop", bare, MALLOC),
        lambda: Side(f"{silos} on Ray", [*ray, "--silos", str(silos)]),
    ) as (by_hand, on_ray):
        ratio = on_ray.median("tokens_per_s") / by_hand.median("tokens_per_s")
        parts = {key: on_ray.median(f"{key}_s") for key in ("load", "train", "save", "send")}
        whole = on_ray.median("seconds")
        target = TARGETS.get(silos)
        yield Ratio(
            f"silo, {silos} on Ray",
            f"tokens/s of {silos} silo{'s' * (silos > 1)} on Ray / of the bare loop with {os.cpu_count()} threads",
            ratio,
            f">= {target}" if target else "",
            ratio >= target if target else None,
            {
                "tokens/s on Ray": on_ray.median("tokens_per_s"),
                "tokens/s of the bare loop": by_hand.median("tokens_per_s"),
                "while it trains": f"{ratio * whole / parts['train']:.3f} of the bare loop",
                "seconds of a round": {"all": whole, **parts},
                "pairs": [
                    round(a["tokens_per_s"] / b["tokens_per_s"], 3)
                    for a, b in zip(on_ray.figures, by_hand.figures, strict=True)
                ],
                "bare loop": by_hand.about,
                "silos": on_ray.about["silos"],
                "steps a round": steps,
            },
        )


if __name__ == "__main__":
    parser = options(__doc__ or "", repeats=3)
    parser.add_argument("--silos", type=int, default=1, help="that share the cores")
    parser.add_argument("--steps", type=int, help="of a round (default: 50 / silos)")
    tell(parser.parse_args(sys.argv[1:]), bench)
