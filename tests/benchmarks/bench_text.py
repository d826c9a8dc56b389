"""Text on its way in: tokenising against the bare library, and what a silo's stream costs beside its training.

Raw is `tokenizers.encode_batch_fast` on text in memory, whose result is thrown away; ours reads parts from disk and
leaves shards on disk, with counts and checksums. The stream's share is its CPU time per token over that of training
one, Ray Data's processes included.
"""

import argparse
import os
import sys
from collections.abc import Iterator

from bare import MALLOC
from reference import SIZES, text_job, training_tokens
from sides import HERE, Ratio, Side, options, taking_turns, tell

from dept_ray.preparing import prepare

INGEST, STREAM = 0.9, 0.01


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """Three ratios: ingest in one process, ingest on Ray, the stream's share of the CPU."""
    size = SIZES[asked.size]
    job = text_job(size, asked.folder)
    prepare(job, local=True)
    way = lambda name: [HERE / "text_side.py", name, "--size", asked.size, "--folder", asked.folder]  # noqa: E731

    with taking_turns(
        asked.repeats,
        lambda: Side("raw tokenizers", way("raw")),
        lambda: Side("text.prepare", way("ours")),
        lambda: Side("text.prepare on Ray", way("ray")),
    ) as (raw, *sides):
        for side in sides:
            ratio = side.median("tokens_per_s") / raw.median("tokens_per_s")
            yield Ratio(
                side.name, f"tokens/s of {side.name} / of raw encode_batch_fast, {os.cpu_count()} cores",
                ratio, f">= {INGEST}", ratio >= INGEST,
                {
                    "tokens/s": side.median("tokens_per_s"),
                    "raw": raw.median("tokens_per_s"),
                    "CPU seconds a million tokens": round(side.median("cpu_s_per_mtoken"), 3),
                    "raw, of CPU": round(raw.median("cpu_s_per_mtoken"), 3),
                    "pairs": [
                        round(a["tokens_per_s"] / b["tokens_per_s"], 3)
                        for a, b in zip(side.figures, raw.figures, strict=True)
                    ],
                },
            )  # fmt: skip

    bare = [HERE / "bare.py", "--size", asked.size, "--steps", "10", "--tokens", training_tokens(job)]
    with taking_turns(
        asked.repeats,
        lambda: Side("bare loop", bare, MALLOC),
        lambda: Side("stream", way("stream")),
    ) as (training, stream):
        ratio = stream.median("cpu_s_per_mtoken") / training.median("cpu_s_per_mtoken")
        yield Ratio(
            "stream", "CPU seconds of a silo's stream / of training the same tokens", ratio,
            f"< {STREAM}", ratio < STREAM,
            {"tokens/s of the stream alone": stream.median("tokens_per_s"),
             "CPU seconds a million tokens": round(stream.median("cpu_s_per_mtoken"), 4),
             "of training": round(training.median("cpu_s_per_mtoken"), 1)},
        )  # fmt: skip


if __name__ == "__main__":
    tell(options(__doc__ or "", repeats=3).parse_args(sys.argv[1:]), bench)
