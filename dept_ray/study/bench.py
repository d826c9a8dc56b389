"""`dept-ray bench`: run the benchmarks of tests/benchmarks on this machine and gather their ratios.

Each benchmark is a program of its own that prints one JSON object a ratio; what is measured, and how, stands there.
They come with a checkout of the repository, not with the installed package: they are no part of training.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dept_ray.console import figure_table
from dept_ray.errors import ConfigError, nearest

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "silo": ("bench_silo.py",),
    "silos": ("bench_silo.py", "--silos", "4"),
    "gpu": ("bench_gpu.py",),
    "coordinator": ("bench_coordinator.py",),
    "overlap": ("bench_overlap.py",),
    "startup": ("bench_startup.py",),
    "text": ("bench_text.py",),
    "joining": ("bench_joining.py",),
    "peers": ("bench_peers.py",),
}
"""By name: the program, and what it is told."""

Figures = dict[str, Any]
"""A ratio: name, what, value, target, met, details, load (`Ratio` in tests/benchmarks/sides.py)."""


def programs() -> Path:
    """The folder of the benchmarks, beside the package in a checkout.

    Raises:
        ConfigError: this package was installed without its repository.
    """
    folder = Path(__file__).resolve().parents[2] / "tests" / "benchmarks"
    if not (folder / "sides.py").exists():
        raise ConfigError(
            "the benchmarks are no part of the installed package: clone the repository, install it from there "
            "(`pip install -e .`), and run `dept-ray bench` again"
        )
    return folder


def run_benchmarks(names: tuple[str, ...], folder: str, size: str, repeats: int | None) -> Iterator[Figures]:
    """Run benchmarks one after the other; their progress goes to stderr.

    Args:
        names: keys of `BENCHMARKS`; none: all.
        folder: keeps prepared text and runs.
        size: full, or small (whether they run at all).
        repeats: measurements of each side; None: each benchmark's own number.

    Yields:
        Ratios as they come; of a benchmark that failed, one with `value` None and `what` that says so.

    Raises:
        ConfigError: there is no such benchmark, or the programs are not here.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f'no benchmark "{name}"{nearest(name, list(BENCHMARKS))}')
    here = programs()
    more = [] if repeats is None else ["--repeats", str(repeats)]
    for name in names or tuple(BENCHMARKS):
        program, *told = BENCHMARKS[name]
        command = [sys.executable, str(here / program), *told, *more, "--size", size, "--folder", folder, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            yield {
                "name": name, "what": f"failed with exit status {process.returncode}; see above", "value": None,
                "target": "", "met": False, "details": {}, "load": [0.0, 0.0],
            }  # fmt: skip


def render(ratios: Sequence[Figures]) -> RenderableType:
    """The table, and what each ratio is of."""
    table = figure_table("Measured side by side, in turns", "", "ratio", "target", "", "load")
    for ratio in ratios:
        value = "failed" if ratio["value"] is None else f"{ratio['value']:.3f}"
        verdict = {None: "", True: "met", False: "missed"}[ratio["met"]] if ratio["value"] is not None else ""
        table.add_row(ratio["name"], value, ratio["target"], verdict, f"{ratio['load'][0]:.1f}")
    told = Text()
    for ratio in ratios:
        told.append(f"\n{ratio['name']}: ", "bold")
        told.append(ratio["what"] + "\n")
        for key, value in ratio["details"].items():
            told.append(f"  {key}: {value}\n", "dim")
    return Group(told, table)
