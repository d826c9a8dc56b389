"""A Hugging Face checkpoint, in a folder or on the Hub: its settings, its tokenizer and its tensors.

Each file is fetched when it is asked for, the small ones first, so that a model that does not fit costs no download.
Safetensors alone: nothing unpickles what a file holds. What the tensors mean stands in `silo.hugging_face`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dept_ray.errors import ConfigError, StoreError


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint."""

    name: str
    """A folder, or a model's name on the Hub."""

    @property
    def place(self) -> str:
        """The folder, absolute, or the name."""
        return str(Path(self.name).absolute()) if Path(self.name).is_dir() else self.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its config.json.

        Raises:
            ConfigError: there is no such checkpoint.
            StoreError: the file is damaged.
        """
        return self._json("config.json") or {}

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json.

        Raises:
            ConfigError: it has none.
        """
        file = self._file("tokenizer.json")
        if file is None:
            raise ConfigError(
                f"init.checkpoint = {self.name!r} has no tokenizer.json, so that nobody knows what its rows mean: "
                'write one with transformers (AutoTokenizer, save_pretrained), or set init.embedding = "random"'
            )
        return file

    def reader(self) -> Callable[[str], torch.Tensor]:
        """Reads a tensor by its name in the whole model; a file of the model without its head lacks the first part.

        Raises:
            ConfigError: it holds no safetensors.
            StoreError: later, where a tensor is missing or a file damaged.
        """
        index = self._json("model.safetensors.index.json", needed=False)
        files: dict[str, str] = index["weight_map"] if index else {}
        whole = None if files else self._file("model.safetensors")
        if not files and whole is None:
            raise ConfigError(
                f"init.checkpoint = {self.name!r} has no model.safetensors: write it with transformers "
                "(from_pretrained, then save_pretrained); pickled weights are not read"
            )

        def take(name: str) -> torch.Tensor:
            from safetensors import SafetensorError, safe_open

            short = name.split(".", 1)[1]
            try:
                at = whole or self._file(files.get(name) or files[short])
                if at is None:
                    raise FileNotFoundError(files)
                with safe_open(at, "pt") as file:
                    return file.get_tensor(name if name in file.keys() else short)  # noqa: SIM118 - it is no mapping
            except (SafetensorError, OSError, KeyError) as err:
                raise StoreError(
                    f"init.checkpoint = {self.name!r}: {name} cannot be read ({err}): fetch the checkpoint again"
                ) from None

        return take

    def _json(self, name: str, needed: bool = True) -> dict[str, Any] | None:
        file = self._file(name)
        if file is None:
            if not needed:
                return None
            raise ConfigError(
                f"init.checkpoint = {self.name!r}: neither a folder with a {name} nor a model on the Hub that has one"
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as err:
            raise StoreError(f"{file} cannot be read ({err}): fetch the checkpoint again") from None
        return found

    def _file(self, name: str) -> Path | None:
        """One of its files, fetched where that is due; None: it has none of that name."""
        if Path(self.name).is_dir():
            file = Path(self.name) / name
            return file if file.exists() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name))
        except Exception as err:  # noqa: BLE001 - its own, the network's and the name's have no common parent
            if isinstance(err, EntryNotFoundError) and not isinstance(err, LocalEntryNotFoundError):
                return None  # the Hub answered, and has no such file
            why = " ".join(f"{type(err).__name__}: {err}".split())
            raise ConfigError(
                f"init.checkpoint = {self.name!r}: no such folder, and {name} cannot be had from the Hub ({why}); "
                "check the name, the network, and that you may read it (hf auth login)"
            ) from None
