"""A silo's snapshot: all that it alone knows after a round, in a folder of its own storage.

    <storage>/silos/<run>/<silo>/000012-0/   embedding.safetensors  body.safetensors  optimizer.safetensors  state.json

Only what stays home is in it (under GLOB just the position). `state.json` is written last, by rename, with the
checksums of the rest: a folder without it, or that differs from it, is refused. The name carries round and
attempt, so a late attempt can never overwrite what a manifest names.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dept_ray.draws import checksum
from dept_ray.errors import StoreError
from dept_ray.text.shards import write_atomically

Parts = Mapping[str, Mapping[str, torch.Tensor]]
"""File stem -> name -> tensor."""


def snapshot_name(round: int, attempt: int) -> str:
    """The name of what a silo is after a round.

    >>> snapshot_name(12, 0)
    '000012-0'
    """
    return f"{round:06d}-{attempt}"


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


def drop_lost_snapshots(folder: Path, after: str | None, latest: str) -> None:
    """Delete what attempts between `after`, which a manifest names (None: nothing), and `latest` left: none counted."""
    for path in folder.iterdir():
        if path.is_dir() and (after or "") < path.name < latest:
            shutil.rmtree(path, ignore_errors=True)


def prune_snapshots(folder: Path, current: str, keep: int) -> None:
    """Keep `current` and the `keep` snapshots before it; what lies beyond it was never committed."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    before = [name for name in names if name < current]
    for name in [*before[: max(0, len(before) - keep)]]:
        shutil.rmtree(folder / name, ignore_errors=True)
