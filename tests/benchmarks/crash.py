"""From a crash to training again: how a side of `bench_peers` loses a worker, and what is read of it. No benchmark.

Every worker notes in a file of its source when it has made an optimizer step, and by which process. Once a source has
made one and a half rounds of them, and so in the middle of a round, the process that trains it is killed (SIGKILL).
Read of these notes alone, and so alike of all sides, are

    again_s         seconds from the kill until that source makes a step again, in whichever process
    others_steps    steps that the other sources made meanwhile
    pause_s         the longest that nobody made a step meanwhile; pause_before_s: the same in the rounds before
    steps_after     by source, those of the two rounds that follow; workers_after: how many processes made them

Each side adds rounds_lost: how many that were finished, or begun, all of its workers have to make again.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sides import Figures

BEFORE_S, CAP_S = 900.0, 180.0
"""How long the middle of the second round is waited for, and the source that was killed."""
ROUNDS_AFTER = 2
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Step:
    """One that was made."""

    at: float
    """Seconds since the epoch, of this machine's one clock."""
    pid: int


Notes = Mapping[str, Sequence[Step]]
"""By source, in their order."""


def note_step(folder: Path, source: str) -> None:
    """In a worker: it has made a step."""
    with open(folder / source, "a") as file:
        file.write(f"{time.time()} {os.getpid()}\n")


def read_steps(folder: Path, source: str) -> list[Step]:
    """What was noted of a source so far."""
    file = folder / source
    lines = file.read_text().splitlines() if file.exists() else []
    return [Step(float(at), int(pid)) for at, pid in (line.split() for line in lines)]


def kill_one(folder: Path, victim: str, steps: int, cap_s: float = CAP_S) -> Figures:
    """Kill the process that trains a source, while rounds go on by themselves, and read what follows.

    Args:
        folder: of the notes; the first round begins at about the time of this call.
        victim: the source.
        steps: of a round.
        cap_s: who has not come back by then does not.

    Raises:
        SystemExit: nobody trains.
    """
    began = time.time()

    def made(source: str, since: float) -> list[Step]:
        return [step for step in read_steps(folder, source) if step.at > since]

    if not _wait(lambda: len(made(victim, began)) >= steps + steps // 2, BEFORE_S):
        raise SystemExit(f"{victim} did not come to the middle of its second round in {BEFORE_S:g} s: see above")
    process = made(victim, began)[-1].pid
    os.kill(process, signal.SIGKILL)
    killed = time.time()
    _wait(lambda: any(step.pid != process for step in made(victim, killed)), cap_s)
    back, rest = time.time(), ROUNDS_AFTER * steps
    _wait(lambda: max(len(made(file.name, back)) for file in folder.iterdir()) >= rest, cap_s)
    notes = {file.name: made(file.name, began) for file in sorted(folder.iterdir())}
    return reading(notes, victim, process, killed, cap_s)


def reading(notes: Notes, victim: str, process: int, killed: float, cap_s: float = CAP_S) -> Figures:
    """The figures of a crash; see the module.

    Args:
        notes: from before the kill until enough was seen.
        victim: the source that `process` trained.
        killed: when.
        cap_s: what `again_s` is where the source did not come back (`back` says so).
    """
    back = [step.at for step in notes[victim] if step.pid != process and killed < step.at <= killed + cap_s]
    again = min(back, default=killed + cap_s)
    everybody = sorted(step.at for steps in notes.values() for step in steps)
    last = [at for at in everybody if at <= killed][-1:]
    meanwhile = [at for at in everybody if killed < at <= again]
    others = [step.at for source, steps in notes.items() if source != victim for step in steps]
    after = {source: [step for step in steps if step.at >= again] for source, steps in notes.items()}
    return {
        "again_s": round(again - killed, 2),
        "back": bool(back),
        "others_steps": sum(killed < at < again for at in others),
        "pause_s": _longest([*last, *meanwhile] if back else [*last, *meanwhile, again]),
        "pause_before_s": _longest([at for at in everybody if at <= killed]),
        "steps_after": {source: len(steps) for source, steps in after.items()},
        "workers_after": len({step.pid for steps in after.values() for step in steps}),
    }


def _longest(moments: Sequence[float]) -> float:
    """Seconds between two of them."""
    return round(max((after - before for before, after in pairwise(moments)), default=0.0), 2)


def _wait(there: Callable[[], bool], at_most_s: float) -> bool:
    """Whether it comes to be within so many seconds."""
    until = time.monotonic() + at_most_s
    while not (now := there()) and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
    return now
