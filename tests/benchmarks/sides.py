"""Two sides measured side by side, in turns, on one machine that is never quiet: what every benchmark here stands on.

A *side* is a program in a process of its own, with the environment it would really have. It gets ready, then measures
once each time it is asked, its speed unless it is asked for something else; the others do nothing meanwhile. Sides take
turns (A B A B ...), so that what else the machine does falls on all of them, and the ratio of their medians is the
result. Nothing here knows what is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Measure = Callable[[], Figures]
Ready = tuple[Figures, dict[str, Measure]]
"""What a side says about itself, and all that it can measure, by name."""
SPEED = "speed"
"""The measurement that every side has."""
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ratio:
    """One line of the table."""

    name: str
    what: str
    """Both sides in words, as in "a silo's tokens/s / the bare loop's"."""
    value: float
    target: str
    """Such as ">= 0.97" or "< 12 s"; empty where there is none."""
    met: bool | None
    """Whether the target is; None where there is none."""
    details: dict[str, Any] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)
    """Average over a minute, as it began and as it ended; the measurement itself adds its threads to the second."""


class Side:
    """A program that measures when it is asked; see `serve`.

    Args:
        name: as the table calls it.
        command: arguments of the interpreter, a program of this folder first.
        environment: added to this process's own.
        python: the interpreter.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        python: Path = Path(sys.executable),
    ) -> None:
        self.name, self.figures = name, list[Figures]()
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [str(python), *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.about = self._answer()
        say(f"{name}: ready after {time.perf_counter() - began:.0f} s {self.about or ''}")

    def measure(self, what: str = SPEED) -> Figures:
        """Once more."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        figures = self._answer()
        say(f"{self.name}: {figures}")
        return figures

    def median(self, key: str) -> float:
        """Of one figure over all measurements of the turns that it took."""
        return statistics.median(figures[key] for figures in self.figures)

    def close(self) -> None:
        """Let it end by itself, for its own children end with it; who cannot is ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()} instead of an answer: see above")
        return json.loads(line)


def serve(get_ready: Callable[[], Ready]) -> None:
    """In a side's own process: get ready, say what about, then measure what each line that comes asks for.

    What else is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(figures: Figures) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    about, measures = get_ready()
    answer(about)
    for line in sys.stdin:
        answer(measures[line.strip()]())


@contextmanager
def taking_turns(repeats: int, *makers: Callable[[], Side]) -> Iterator[list[Side]]:
    """Sides that are made one after the other, have measured `repeats` times each, in turns, and end afterwards."""
    with ExitStack() as stack:
        sides = []
        for make in makers:
            sides.append(make())
            stack.callback(sides[-1].close)
        for _ in range(repeats):
            for side in sides:
                side.figures.append(side.measure())
        yield sides


def timed_command(command: Sequence[str | Path], **more: Any) -> Figures:
    """Run to its end and count: `seconds` on the wall, `cpu_s` of it and of all its children that ended."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, **more)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.perf_counter() - began, "cpu_s": cpu}


def say(text: str) -> None:
    """To whoever watches; the result alone is on stdout."""
    print(f"  {text}", file=sys.stderr, flush=True)


def options(about: str, repeats: int) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: only whether it runs")
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each side")
    parser.add_argument("--folder", type=Path, help="keeps prepared text (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of words")
    return parser


def tell(asked: argparse.Namespace, bench: Callable[[argparse.Namespace], Iterator[Ratio]]) -> None:
    """Run a benchmark and print its ratios as they come."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dept-bench-") as temporary:
        asked.folder = (asked.folder or Path(temporary)).absolute()
        asked.folder.mkdir(parents=True, exist_ok=True)
        for ratio in bench(asked):
            line = asdict(ratio) | {"load": (round(load, 2), round(os.getloadavg()[0], 2))}
            print(json.dumps(line) if asked.json else in_words(ratio), flush=True)


def in_words(ratio: Ratio) -> str:
    """One line, and its details below."""
    told = {None: "", True: f" (target {ratio.target}: met)", False: f" (target {ratio.target}: MISSED)"}[ratio.met]
    details = "".join(f"\n    {key}: {value}" for key, value in ratio.details.items())
    return f"{ratio.name}: {ratio.what} = {ratio.value:.3f}{told}{details}"
