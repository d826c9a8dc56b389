"""Four silos of ours beside four workers of others: the same model, text, steps a round and threads.

Others: DiLoCo over gloo, written plainly, and Flower's simulation engine, which is installed from the package registry
into a venv of its own under the benchmark's folder. Ours is GLOB with Nesterov outside, which sends what they send.
Also told: bytes sent in a round, the workers' memory at its peak, and how long the first round took from the start,
with nothing compiled before.

In the end each side in turn loses a worker in the middle of a round (`crash`). Ours and Flower's engine are left to
themselves; DiLoCo has nobody who would see it, so an operator's loop, as torchrun is one, starts all workers anew.
"""

import argparse
import subprocess
import sys
import sysconfig
import uuid
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

from bare import MALLOC
from crash import CAP_S, ROUNDS_AFTER
from reference import SIZES, job_of, training_tokens
from sides import HERE, Figures, Ratio, Side, options, say, taking_turns, tell

from dept_ray.preparing import prepare

WORKERS, STEPS = 4, 20


def bench(asked: argparse.Namespace) -> Iterator[Ratio]:
    """Two ratios for each of the others: of speed, and after a crash."""
    size = SIZES[asked.size]
    steps = STEPS if asked.size == "full" else size.steps
    name = f"peers-{uuid.uuid4().hex[:8]}"
    job = job_of(size, asked.folder, name, WORKERS, steps, method="glob")
    prepare(job, local=True)
    common = ["--size", asked.size, "--steps", str(steps)]
    files = ["--tokens", *(training_tokens(job, source.name) for source in job.sources)]
    notes = asked.folder / "steps" / name
    ray = [HERE / "ray_run.py", *common, "--folder", asked.folder, "--name", name, "--silos", str(WORKERS)]

    def compiled(side: str) -> dict[str, str]:  # nobody finds on disk what another run, or side, has compiled
        return {"TORCHINDUCTOR_CACHE_DIR": str(asked.folder / "compiled" / name / side)}

    diloco = [HERE / "diloco.py", *common, *files, "--notes", notes / "diloco"]
    makers: list[Callable[[], Side]] = [
        lambda: Side("dept_ray", [*ray, "--method", "glob", "--outer", "nesterov"], compiled("ours")),
        lambda: Side("DiLoCo over gloo", diloco, MALLOC | compiled("diloco")),
    ]
    if asked.flower and (python := flower_python(asked.folder / "flower")) is not None:
        flower = [HERE / "flower.py", *common, *files, "--notes", notes / "flower"]
        makers.append(lambda: Side("Flower simulation", flower, MALLOC | compiled("flower"), python))
    with taking_turns(asked.repeats, *makers) as sides:
        ours, *others = sides
        for other in others:
            ratio = ours.median("tokens_per_s") / other.median("tokens_per_s")
            yield Ratio(
                f"against {other.name}",
                f"tokens/s of {WORKERS} silos in whole rounds of {steps} steps / of {other.name}",
                ratio, ">= 1", ratio >= 1,
                {
                    side.name: {
                        "tokens/s": side.median("tokens_per_s"),
                        "seconds of a round": side.median("seconds"),
                        "MB sent in a round": round(side.median("sent_bytes") / 1e6, 1),
                        "MiB of the workers at their peak": side.median("silo_mib"),
                        "seconds to the end of the first round": side.about["first_round_s"],
                    }
                    for side in (ours, other)
                } | {"pairs": [
                    round(a["tokens_per_s"] / b["tokens_per_s"], 3)
                    for a, b in zip(ours.figures, other.figures, strict=True)
                ]},
            )  # fmt: skip
        crashes = {side.name: side.measure("crash") for side in sides}
        for other in others:
            yield after_a_crash(steps, {name: crashes[name] for name in (ours.name, other.name)})


def after_a_crash(steps: int, crashes: dict[str, Figures]) -> Ratio:
    """Of ours and another, by name: how soon the source whose worker was killed is trained again."""
    mine, theirs = crashes.values()
    other, ratio = list(crashes)[-1], mine["again_s"] / theirs["again_s"]
    return Ratio(
        f"against {other}, after a crash",
        f"seconds from a worker's SIGKILL until its source is trained again, ours / of {other}",
        ratio, "<= 1", ratio <= 1,
        {
            name: {
                "seconds until its source is trained again": figures["again_s"] if figures["back"]
                else f"not within {CAP_S:g}, which is what counts",
                "steps that others made meanwhile": figures["others_steps"],
                "seconds in which nobody trained, at most": figures["pause_s"],
                "of rounds without a crash": figures["pause_before_s"],
                "rounds that all make again": figures["rounds_lost"],
                f"steps of each source in the {ROUNDS_AFTER * steps} that follow": figures["steps_after"],
                "workers that made them": figures["workers_after"],
            }
            for name, figures in crashes.items()
        },
    )  # fmt: skip


def flower_python(folder: Path) -> Path | None:
    """An interpreter with Flower (and its own Ray) before this one's packages; None where it cannot be installed."""
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    say("installing flwr[simulation] into a venv of its own")
    venv.create(folder, with_pip=True, clear=True)
    inside = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # torch is this environment's: the same build on both sides. What is installed from a checkout is found there.
    (inside / "zz_outside.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{HERE.parents[1]}\n")
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "flwr[simulation]"], capture_output=True, text=True
    )
    if done.returncode:
        say(f"Flower is left out, pip cannot install it: {done.stderr.strip().splitlines()[-1]}")
        return None
    (folder / "installed").touch()
    return python


if __name__ == "__main__":
    parser = options(__doc__ or "", repeats=3)
    parser.add_argument("--no-flower", dest="flower", action="store_false", help="do not install and measure Flower")
    tell(parser.parse_args(sys.argv[1:]), bench)
