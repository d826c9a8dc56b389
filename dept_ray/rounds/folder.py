"""What anyone may read of a run's folder: who trains there, its job, its committed rounds. `store` writes them."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.errors import StoreError
from dept_ray.metrics import read_records

if TYPE_CHECKING:
    from dept_ray.rounds.state import RunState


def run_folder(job: Job) -> Path:
    """Where a job's run is kept."""
    return Path(job.folder) / "runs" / job.name


def in_progress(folder: Path) -> dict[str, Any] | None:
    """Where a run is in progress (pid, host, address), or None if it is not. The lock of a dead process is free.

    Raises:
        StoreError: this user may not look.
    """
    try:
        lock = open(folder / "lock")  # noqa: SIM115 - closed below; what opening fails with is not what locking does
    except FileNotFoundError:
        return None
    except OSError as err:
        raise StoreError(
            f"{folder / 'lock'} cannot be opened ({err}), so that nobody knows whether the run is in progress: let "
            "this user read it, or ask as the user who trains there"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return last_place(folder)


def last_place(folder: Path) -> dict[str, Any]:
    """Where who holds a run, or held it last and told no end, says it is in progress; empty: nothing is said."""
    try:
        return json.loads((folder / "live.json").read_text())
    except (OSError, ValueError):
        return {}


def in_words(where: Mapping[str, Any]) -> str:
    """Where a run is in progress.

    >>> in_words({"pid": 12, "host": "box", "address": "10.0.0.1:6379"})
    'process 12 on box, Ray at 10.0.0.1:6379'
    """
    words = [f"process {where['pid']} on {where['host']}"] if "pid" in where else []
    words += [f"Ray at {where['address']}"] if "address" in where else []
    return ", ".join(words) or "elsewhere"


def told_end(folder: Path) -> bool:
    """Whether a run that is not in progress came to an end that it told: finished, failed, or stopped as asked."""
    if in_progress(folder) is not None:
        return False
    if (folder / "error.txt").exists() or any(r["event"] == "scores" for r in read_records(folder / "metrics.jsonl")):
        return True
    try:
        return bool(json.loads((folder / "asked.json").read_text())["stopping"])
    except (OSError, ValueError, KeyError):
        return False


def read_job(folder: Path) -> Job:
    """The job of a run's folder, as the run began.

    Raises:
        StoreError: it cannot be read.
    """
    file = folder / "config.json"
    try:
        job = Job.model_validate(json.loads(file.read_text())["job"])
    except (OSError, ValueError, KeyError) as err:
        raise StoreError(f"{file} cannot be read ({err}): restore it") from None
    # The folder may have been moved since: its data and snapshots came along.
    return job.model_copy(update={"folder": str(folder.absolute().parents[1])})


def committed(folder: Path) -> list[int]:
    """Committed rounds in a run's folder, oldest first."""
    return sorted(int(path.parent.name) for path in (folder / "rounds").glob("*/manifest.json"))


def last_round(folder: Path) -> int:
    """Number of the last committed round in a run's folder.

    Raises:
        StoreError: there is none.
    """
    rounds = committed(folder)
    if not rounds:
        raise StoreError(f"run folder {folder} has no committed round yet: train first")
    return rounds[-1]


def load_round(folder: Path, round: int) -> "tuple[RunState, dict[str, Any]]":
    """A committed round and its manifest.

    Raises:
        StoreError: a file is missing or altered.
    """
    from safetensors.torch import load

    from dept_ray.rounds.state import RunState, SiloRecord

    where = folder / "rounds" / f"{round:06d}"
    manifest = read_manifest(where)
    try:
        tensors = {}
        for name, expected in manifest["files"].items():
            blob = (where / f"{name}.safetensors").read_bytes()
            if checksum(blob) != expected:
                raise StoreError(
                    f"{where / name}.safetensors was altered: restore it, or delete {where} to go back a round"
                )
            tensors[name] = load(blob)[name]
        silos = {name: SiloRecord(**silo) for name, silo in manifest["silos"].items()}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise StoreError(
            f"round {round} in {where} cannot be read ({err}): restore it, or delete the folder to go back a round"
        ) from err
    counts = {"step": manifest["step"], "changes": tuple(manifest["changes"]), "heard": manifest["heard"]}
    return RunState(manifest["round"], silos, **tensors, **counts), manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a committed round says of itself.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        needed = {"round", "files", "silos", "corpora", "layout", "record", "step", "changes", "heard"}
        if missing := needed - set(manifest):
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return manifest
    except (OSError, ValueError, TypeError) as err:
        raise StoreError(
            f"{folder}/manifest.json cannot be read ({err}): restore it, or delete {folder} to go back a round"
        ) from err


def layout_fingerprint(job: Job) -> str:
    """What each element of a body's flat vector means."""
    from dept_ray.silo.model import layout_of

    return layout_of(job.model).fingerprint  # pyright: ignore[reportArgumentType] - a frozen section has a hash
