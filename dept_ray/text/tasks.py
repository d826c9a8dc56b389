"""The work that `prepare` is made of: functions of one `Task` that read and write one source's storage.

    clean     a source's raw text      -> text parts (parquet), de-duplicated, split, capped; their index.json
    sample    the text parts           -> some documents, for a global tokenizer
    learn_own the text parts           -> tokenizer.json
    pack      one text part            -> one token shard, its counts beside it
    index     the shards of a source   -> index.json, the fact that the corpus exists

A task runs anywhere that sees the storage and writes every file whole or not at all, its index or counts last: what a
killed task leaves behind is written again, never read.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dept_ray.draws import checksum, digest, generator
from dept_ray.sections import TokenizerSection
from dept_ray.source_sections import Source
from dept_ray.text import shards
from dept_ray.text.shards import ShardFile, Split
from dept_ray.text.sources import documents
from dept_ray.text.tokenizer import end_of_text, load_tokenizer, open_tokenizer, train_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_BYTES = 8 << 20
"""Text in one part: a few seconds of tokenising, so that the tasks of one source share the cores."""
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Task:
    """One unit of work for one source; small and picklable."""

    source: Source
    folder: Path
    """Where the tokens go."""
    text: Path
    """The source's text parts."""
    tokenizer: TokenizerSection
    part: str = ""
    """Name of a text part, for `pack`."""
    sample_bytes: int = 0
    """Text that a tokenizer is trained on, for `sample` and `learn_own`."""


# ---------------------------------------------------------------------------------------------- text
def clean(task: Task) -> None:
    """Read a source and write its text parts."""
    task.text.mkdir(parents=True, exist_ok=True)
    index = {split: {"parts": 0, "documents": 0, "bytes": 0, "checksum": ""} for split in SPLITS}
    waiting: dict[Split, list[str]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)

    def write(split: Split) -> None:
        entry: dict[str, Any] = index[split]
        blob = _parquet(waiting[split])
        shards.write_atomically(task.text / f"{split}-{entry['parts']:05d}.parquet", blob)
        entry["checksum"] = digest(entry["checksum"], checksum(blob))
        entry["parts"] += 1
        entry["documents"] += len(waiting[split])
        entry["bytes"] += size[split]
        waiting[split], size[split] = [], 0

    for split, text in documents(task.source):
        waiting[split].append(text)
        size[split] += len(text.encode())
        if size[split] >= PART_BYTES:
            write(split)
    for split, texts in waiting.items():
        if texts:
            write(split)
    shards.write_atomically(task.text / "index.json", json.dumps(index, indent=1).encode())


def _parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def text_index(folder: Path) -> dict[Split, dict[str, Any]]:
    """What a cleaned text holds, by split: `parts`, `documents`, `bytes` and `checksum`."""
    return json.loads((folder / "index.json").read_text())


def text_parts(folder: Path) -> list[str]:
    """Names of the parts of a cleaned text, training first."""
    index = text_index(folder)
    return [f"{split}-{i:05d}" for split in SPLITS for i in range(index[split]["parts"])]


def read_part(path: Path) -> Iterator[str]:
    """Documents of one text part."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64, columns=["text"]):
            yield from batch.column("text").to_pylist()


# ---------------------------------------------------------------------------------------------- tokenizers
def sample(task: Task) -> list[str]:
    """Documents of a source's training text, whole parts in a drawn order; the last is cut at `sample_bytes`."""
    parts = [name for name in text_parts(task.text) if name.startswith("train")]
    texts: list[str] = []
    left = task.sample_bytes
    for i in generator("sample", task.source.name).permutation(len(parts)):
        for text in read_part(task.text / f"{parts[i]}.parquet"):
            data = text.encode()
            if len(data) >= left:
                return [*texts, data[:left].decode(errors="ignore")]
            texts.append(text)
            left -= len(data)
    return texts


def learn_own(task: Task) -> None:
    """Make the tokenizer of one source from its own text, unless it is there."""
    if (task.folder / "tokenizer.json").exists():
        return
    if task.tokenizer.kind in ("file", "hub"):
        tokenizer = load_tokenizer(task.tokenizer)
    else:
        tokenizer = train_tokenizer(sample(task), task.tokenizer, f'source "{task.source.name}"')
    save_tokenizer(tokenizer, task.folder)


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())


# ---------------------------------------------------------------------------------------------- tokens
def pack(task: Task) -> None:
    """Tokenise one text part into one shard; its counts and checksum stand beside it until the index is written."""
    from safetensors.numpy import save

    done = task.folder / f"{task.part}.safetensors"
    if done.exists():
        return
    tokenizer = open_tokenizer(task.folder / "tokenizer.json")
    dtype = _dtype(vocabulary_size(tokenizer))
    text_bytes = 0

    def batches() -> Iterator[list[str]]:
        nonlocal text_bytes
        batch, size = [], 0
        for text in read_part(task.text / f"{task.part}.parquet"):
            batch.append(text)
            size += len(text.encode())
            if size >= PART_BYTES // 2:
                yield batch
                text_bytes += size
                batch, size = [], 0
        yield batch
        text_bytes += size

    def encode(texts: list[str]) -> list[np.ndarray]:
        # encode_batch_fast skips offsets; special tokens of a loaded tokenizer are not wanted: shards place their own.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.fromiter(encoding.ids, dtype, len(encoding)) for encoding in encodings]

    # Halves, in two threads: while Python reads and copies for one, or the longest text of one is waited for, the cores
    # have the other. Not more and shorter ones: each ends with cores that wait.
    with ThreadPoolExecutor(2) as pool:
        documents = (ids for batch in pool.map(encode, batches()) for ids in batch)
        tokens, counts, found = shards.write_shard(
            task.folder / f"{task.part}.tokens", documents, end_of_text(tokenizer), dtype
        )
    about = {"tokens": str(tokens), "checksum": found, "text_bytes": str(text_bytes)}
    shards.write_atomically(done, save({"counts": counts}, metadata=about))


def _dtype(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def index(task: Task) -> None:
    """Gather a source's shards into its index: now the corpus is a fact."""
    from safetensors import safe_open

    tokenizer = open_tokenizer(task.folder / "tokenizer.json")
    size = vocabulary_size(tokenizer)
    files: dict[Split, list[ShardFile]] = {split: [] for split in SPLITS}
    counts: dict[Split, np.ndarray] = {split: np.zeros(size, np.int64) for split in SPLITS}
    parts = text_parts(task.text)
    for part in parts:
        split: Split = "train" if part.startswith("train") else "validation"
        with safe_open(str(task.folder / f"{part}.safetensors"), framework="numpy") as opened:
            about, found = opened.metadata(), opened.get_tensor("counts")
        counts[split][: len(found)] += found
        file = ShardFile(f"{part}.tokens", int(about["tokens"]), about["checksum"], int(about["text_bytes"]))
        files[split].append(file)
    shards.write_index(
        task.folder,
        files["train"],
        files["validation"],
        dtype=_dtype(size),
        end_of_text=end_of_text(tokenizer),
        counts=counts,
        special=[number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special],
    )
    for part in parts:
        (task.folder / f"{part}.safetensors").unlink(missing_ok=True)


MANY_THREADED = frozenset({learn_own, pack})
"""Work that is most of its time in `tokenizers`, which uses several cores by itself."""
