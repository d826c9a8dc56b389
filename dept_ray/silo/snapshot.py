"""A silo's snapshot: all that it alone knows after a round, in a folder of its own storage.

    <storage>/silos/<run>/<silo>/000012-1-0/  embedding.safetensors  body.safetensors optimizer.safetensors  state.json

Only what stays home is in it (under GLOB just the position) and, where steps are made ahead of their order, what is
shared as the round left it here (`left`). `state.json` is written last, by rename, with the
checksums of the rest: a folder without it, or that differs from it, is refused. The name carries round, life of the
run and attempt, so a late attempt, or a silo that a dead coordinator had ordered, can never overwrite what a manifest
names.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.errors import StoreError
from dept_ray.text.shards import write_atomically

Parts = Mapping[str, Mapping[str, torch.Tensor]]
"""File stem -> name -> tensor."""


def silo_folder(job: Job, silo: str) -> Path:
    """Where a silo's snapshots of a run are: at its own home."""
    return job.storage_of(silo) / "silos" / job.name / silo


def snapshot_name(round: int, life: int, attempt: int) -> str:
    """The name of what a silo is after a round.

    >>> snapshot_name(12, 3, 0)
    '000012-3-0'
    """
    return f"{round:06d}-{life}-{attempt}"


def snapshot_round(name: str) -> int:
    """The round of a snapshot's name.

    >>> snapshot_round("000012-3-0")
    12
    """
    return int(name.split("-")[0])


def save_snapshot(folder: Path, parts: Parts, state: dict[str, Any]) -> None:
    """Write a snapshot; it exists once this returns.

    Raises:
        StoreError: the folder cannot be written.
    """
    from safetensors.torch import save

    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksums = {}
        for stem, tensors in parts.items():
            blob = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
            write_atomically(folder / f"{stem}.safetensors", blob)
            checksums[stem] = checksum(blob)
        write_atomically(folder / "state.json", json.dumps({**state, "files": checksums}, indent=1).encode())
    except OSError as err:
        raise StoreError(
            f"snapshot {folder} cannot be written ({err}): free space or mend the folder, then run again"
        ) from err


def load_snapshot(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a snapshot back.

    Raises:
        StoreError: it is missing, incomplete or altered.
    """
    from safetensors.torch import load

    try:
        state = json.loads((folder / "state.json").read_text())
        parts = {}
        for stem, expected in state["files"].items():
            blob = (folder / f"{stem}.safetensors").read_bytes()
            if checksum(blob) != expected:
                raise StoreError(
                    f"snapshot file {folder / stem}.safetensors was altered: restore it, or start another run"
                )
            parts[stem] = load(blob)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise StoreError(f"snapshot {folder} cannot be read ({err}): restore it, or start another run") from err
    return parts, state


def prune_snapshots(folder: Path, after: str | None, latest: str, count: int, keep: Collection[str] = ()) -> None:
    """Delete what nobody can go back to any more.

    Args:
        folder: of one silo.
        after: what the last round names, which may not be on disk yet; None: nothing.
        latest: the one just written. What lies between the two was written by attempts that did not count.
        count: how many before `after` stay, one at least: the round before is what a crash now goes back to.
        keep: names that stay whatever happens.
    """
    moments = {name: moment for path in folder.iterdir() if (moment := _moment(name := path.name)) is not None}
    named = _moment(after or "") or ()
    before = sorted((name for name, moment in moments.items() if moment < named), key=moments.__getitem__)
    lost = [name for name, moment in moments.items() if named < moment < moments[latest]]
    for name in {*lost, *before[: max(0, len(before) - count)]} - set(keep):
        shutil.rmtree(folder / name, ignore_errors=True)


def _moment(name: str) -> tuple[int, ...] | None:
    """(round, life, attempt) of a snapshot's name; None: it is another folder's."""
    parts = name.split("-")
    return tuple(map(int, parts)) if len(parts) == 3 and all(part.isdigit() for part in parts) else None
