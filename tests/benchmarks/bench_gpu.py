"""One silo on a GPU: how near to the data sheet it computes, and what a smaller vocabulary saves beside one of 250,112.

The paper's models, 24 blocks of 350M on the Pile and 12 blocks on mC4 (arXiv 2410.05021, Tables 1 and 2), each alone on
the GPU, one after the other. Where there is neither Ray nor text: `python tests/benchmarks/bench_gpu.py`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sides import HERE, Ratio, Side, options, say, taking_turns, tell

MFU = 0.45


@dataclass(frozen=True)
class Shape:
    """Of a model, and of a measurement of it."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    at_once: int
    steps: int


PILE, MC4 = Shape(24, 1024, 16, 2048, 64, 16, 5), Shape(12, 768, 12, 2048, 64, 16, 5)
SMALL = Shape(1, 32, 2, 32, 4, 2, 2)
ROWS = {"glob": 250_112, "trim": 216_135, "spec-opt": 50_257}
"""Of the mC4 models' embeddings, by method; of TRIM's the mean."""


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """The MFU of SPEC-OPT at 350M; tokens per second of TRIM and of SPEC-OPT over GLOB's."""
    full = asked.size == "full"
    if full and not torch.cuda.is_available():
        say("no CUDA GPU here: nothing is measured")
        return
    if torch.cuda.is_available():
        side = measured(asked, PILE if full else SMALL, "spec-opt", ROWS["spec-opt"])
        if peak := side.about["peak_flops"]:
            mfu = side.median("flops_per_s") / peak
            met = mfu >= MFU if full else None
            yield Ratio("gpu, MFU", f"FLOP/s of 350M SPEC-OPT / {peak / 1e12:.0f} TFLOP/s of the data sheet", mfu,
                        f">= {MFU}" if full else "", met, told(side))  # fmt: skip
    rows_of = {method: rows if full else rows // 100 for method, rows in ROWS.items()}
    sides = {method: measured(asked, MC4 if full else SMALL, method, rows) for method, rows in rows_of.items()}
    glob = sides.pop("glob")
    for method, side in sides.items():
        ratio = side.median("tokens_per_s") / glob.median("tokens_per_s")
        yield Ratio(
            f"gpu, {method}", f"tokens/s of {method}'s {rows_of[method]:,} rows / of glob's {rows_of['glob']:,}",
            ratio, "", None, {**told(side), **{f"{key}, glob": value for key, value in told(glob).items()}},
        )  # fmt: skip


def measured(asked: argparse.Namespace, shape: Shape, method: str, rows: int) -> Side:
    """A silo that had the GPU to itself."""
    command: list[str] = [str(HERE / "gpu_side.py"), "--method", method, "--vocabulary", str(rows)]
    for name in ("layers", "width", "heads", "context", "batch", "at_once", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(shape, name))]
    with taking_turns(asked.repeats, lambda: Side(f"{method}, {shape.layers} blocks, {rows:,} rows", command)) as sides:
        return sides[0]


def told(side: Side) -> dict[str, object]:
    """What else was seen."""
    return {
        "tokens/s": side.median("tokens_per_s"),
        "TFLOP/s": round(side.median("flops_per_s") / 1e12, 1),
        "GiB at the peak": round(side.median("peak_gib"), 1),
        "silo": side.about,
    }


if __name__ == "__main__":
    tell(options(__doc__ or "", repeats=3).parse_args(sys.argv[1:]), bench)
