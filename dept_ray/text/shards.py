"""Packed token shards: flat files of uint16 or uint32 ids, memory-mapped, and the index that vouches for them.

A shard is one stream `<eot> doc <eot> doc ... <eot>`. It is cut into *blocks* of `context` predictions when it is
read, not when it is written: block i of a shard is the tokens [i*T, i*T + T + 1), so each token but the first is
predicted exactly once and the same shards serve every context length. Only whole blocks are trained on; a sweep pads
the last. The index is written last and atomically and holds the size and checksum of each file; a folder without an
index is no corpus, and a file that differs is never read.
"""

import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dept_ray.draws import checksum, digest
from dept_ray.errors import ShardError
from dept_ray.text.tokenizer import Vocabulary, open_tokenizer, unigram_nats

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "validation"]
FORMAT = 1
_REMEDY = "delete the folder {} and run `dept-ray prepare` again"


@dataclass(frozen=True)
class ShardFile:
    """One file of the index."""

    name: str
    tokens: int
    checksum: str
    text_bytes: int


def write_shard(path: Path, documents: Iterable[np.ndarray], end: int, dtype: str) -> tuple[int, np.ndarray, str]:
    """Write `<eot> doc <eot> doc ... <eot>` atomically.

    Args:
        path: of the shard; a temporary neighbour is renamed onto it.
        documents: 1-dim integer ids, one array per document.
        end: id of end-of-text.
        dtype: "uint16" or "uint32".

    Returns:
        Tokens written, their counts by id (int64, as long as the largest id + 1), the checksum.
    """
    stop = np.array([end], dtype=dtype)
    pieces = [stop]
    for ids in documents:
        pieces += [ids.astype(dtype), stop]
    tokens = np.concatenate(pieces)
    write_atomically(path, tokens)
    return len(tokens), np.bincount(tokens), checksum(tokens)


def write_atomically(path: Path, data: "np.ndarray | bytes") -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    # Random, for on shared storage two machines may give their writers the same process number.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.tobytes() if isinstance(data, np.ndarray) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # there is none, unless something went wrong
        temporary.unlink(missing_ok=True)


def windows(tokens: np.ndarray, context: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All predictions of one stream of tokens (n,) once, in order, `rows` sequences at a time.

    Yields:
        (n, T) inputs and targets, int64; the last sequence is padded, its targets with -1.
    """
    for start in range(0, len(tokens) - 1, rows * context):
        inputs = tokens[start : min(start + rows * context, len(tokens) - 1)].astype(np.int64)
        targets = tokens[start + 1 : start + 1 + len(inputs)].astype(np.int64)
        missing = -len(inputs) % context
        yield (
            np.pad(inputs, (0, missing)).reshape(-1, context),
            np.pad(targets, (0, missing), constant_values=-1).reshape(-1, context),
        )


class Shards:
    """The files of one split, as blocks."""

    def __init__(self, folder: Path, files: list[ShardFile], dtype: str) -> None:
        self.folder, self.files, self.dtype = folder, files, np.dtype(dtype)
        self._maps: dict[int, np.ndarray] = {}

    @property
    def tokens(self) -> int:
        """All tokens, end-of-text included."""
        return sum(file.tokens for file in self.files)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(file.text_bytes for file in self.files)

    def map(self, shard: int) -> np.ndarray:
        """One file's tokens, memory-mapped, read-only."""
        if shard not in self._maps:
            path = self.folder / self.files[shard].name
            self._maps[shard] = np.memmap(path, dtype=self.dtype, mode="r").view(np.ndarray)
        return self._maps[shard]

    def starts(self, context: int) -> np.ndarray:
        """First block number of each shard, and the number of all blocks last: (files + 1,) int64."""
        blocks = [(file.tokens - 1) // context for file in self.files]
        return np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)

    def read(self, blocks: np.ndarray, context: int) -> np.ndarray:
        """Tokens of these blocks, in this order: (n,) -> (n, context + 1)."""
        starts = self.starts(context)
        assert not len(blocks) or (blocks.min() >= 0 and blocks.max() < starts[-1])
        out = np.empty((len(blocks), context + 1), dtype=self.dtype)
        shard_of = np.searchsorted(starts, blocks, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            rows = np.flatnonzero(shard_of == shard)
            # A view in which row i is block i: rows overlap by one token, and only those asked for are copied.
            all_blocks = sliding_window_view(self.map(shard), context + 1)[::context]
            out[rows] = all_blocks[blocks[rows] - starts[shard]]
        return out

    def sweep(self, context: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All predictions once, in order, `rows` sequences at a time.

        Yields:
            (n, T) inputs and targets, int64; the last sequence of a shard is padded, its targets with -1.
        """
        for shard in range(len(self.files)):
            yield from windows(self.map(shard), context, rows)

    def verify(self) -> None:
        """Compare every file with the index.

        Raises:
            ShardError: a file is missing, shortened or altered.
        """
        for i, file in enumerate(self.files):
            path = self.folder / file.name
            expected = file.tokens * self.dtype.itemsize
            found = path.stat().st_size if path.exists() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found} bytes, its index says {expected}"
                raise ShardError(f"shard {path} {what}: {_REMEDY.format(self.folder)}")
            if checksum(self.map(i)) != file.checksum:
                raise ShardError(
                    f"shard {path} does not match its fingerprint (altered since it was written): "
                    f"{_REMEDY.format(self.folder)}"
                )


@dataclass(frozen=True)
class Corpus:
    """One source's prepared tokens: both splits, the tokenizer they were made with, and the counts of every id."""

    folder: Path
    train: Shards
    validation: Shards
    end_of_text: int
    counts: np.ndarray
    """(V,) int64: training tokens by global id."""
    used: np.ndarray
    """Sorted global ids that occur in the source's text, training or validation, and the special ids."""
    fingerprint: str

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids of the tokenizer."""
        return Vocabulary(len(self.counts))

    @property
    def trimmed(self) -> Vocabulary:
        """The ids that occur in this source (V_k of TRIM and SPEC)."""
        return Vocabulary.trimmed(len(self.counts), self.used)

    def rows_of(self, vocabulary: str) -> Vocabulary:
        """Of `rounds.methods`' vocabularies the one asked for: what this source uses, or everything."""
        return self.trimmed if vocabulary == "trimmed" else self.vocabulary

    @property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that made these tokens."""
        return open_tokenizer(self.folder / "tokenizer.json")

    def unigram_nats(self, vocabulary: Vocabulary) -> np.ndarray:
        """Surprise of each row of a vocabulary under the source's unigram model: (V_k,) nats."""
        counts = self.counts if vocabulary.ids is None else self.counts[vocabulary.ids]
        return unigram_nats(counts)


def write_index(
    folder: Path,
    train: list[ShardFile],
    validation: list[ShardFile],
    *,
    dtype: str,
    end_of_text: int,
    counts: Mapping[Split, np.ndarray],
    special: Sequence[int] = (),
) -> None:
    """Make a folder of shards and tokenizer.json a corpus: counts first, the index last.

    `special` ids belong to every vocabulary, whether or not they occur (equation 5).
    """
    from safetensors.numpy import save

    whole = {split: array.astype(np.int64) for split, array in counts.items()}
    write_atomically(folder / "counts.safetensors", save(whole))
    index = {
        "format": FORMAT,
        "dtype": dtype,
        "end_of_text": end_of_text,
        "special": sorted({end_of_text, *special}),
        "fingerprint": _fingerprint(folder, [*train, *validation]),
        "train": [asdict(file) for file in train],
        "validation": [asdict(file) for file in validation],
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1).encode())


def open_corpus(folder: Path, verify: bool = True) -> Corpus:
    """Open prepared tokens.

    Args:
        folder: of one source under one tokenizer.
        verify: read and compare every file's checksum (some GB/s).

    Raises:
        ShardError: there is no index, it cannot be read, or a file differs from it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "index.json"
    if not path.exists():
        raise ShardError(
            f"{folder} holds no prepared tokens (no index.json) on this machine ({platform.node()}): run "
            "`dept-ray prepare` on the job first or, if that was done elsewhere, put `folder` on a disk that both see"
        )
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, this version reads format {FORMAT}")
        files = {split: [ShardFile(**file) for file in index[split]] for split in ("train", "validation")}
        splits = {split: Shards(folder, files[split], index["dtype"]) for split in files}
        end, fingerprint = int(index["end_of_text"]), str(index["fingerprint"])
        path = folder / "counts.safetensors"
        counts = load_file(path)
        for split, shards in splits.items():
            if counts[split].sum() != shards.tokens:
                raise ValueError(f"it counts {counts[split].sum()} {split} tokens, the index {shards.tokens}")
        used = np.union1d(np.flatnonzero(counts["train"] + counts["validation"]), index["special"]).astype(np.int64)
        path = folder / "tokenizer.json"
        if verify and _fingerprint(folder, [*files["train"], *files["validation"]]) != fingerprint:
            raise ValueError("it is not the one that made these tokens")
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as err:
        raise ShardError(f"{path} cannot be read ({err}): {_REMEDY.format(folder)}") from None
    corpus = Corpus(folder, splits["train"], splits["validation"], end, counts["train"], used, fingerprint)
    if verify:
        corpus.train.verify()
        corpus.validation.verify()
    return corpus


def _fingerprint(folder: Path, files: list[ShardFile]) -> str:
    return digest(*(file.checksum for file in files), (folder / "tokenizer.json").read_bytes())
