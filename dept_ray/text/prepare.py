"""From raw text to a corpus per source, in four stages of small, repeatable tasks.

    clean   a source's raw text      -> text parts (parquet), de-duplicated, split, capped        one task per source
    learn   a sample of the text     -> tokenizer.json                                            one, or one per source
    pack    one text part            -> one token shard and its counts                            one task per part
    index   all shards of a source   -> index.json, the fact that the corpus exists               one task per source

Every task writes atomically and is skipped when its result is there, so preparing twice does nothing and a killed
preparation goes on. Where the tasks run is the caller's: `run_here` in this process, or Ray Data next to the text
(`on_ray.ingest`). Text stays in its source's own storage; a global tokenizer alone asks each source for a sample.

    <storage>/data/<source>/text-<key>/     train-00000.parquet ... validation-00000.parquet ... index.json
    <storage>/data/<source>/tokens-<key>/   tokenizer.json counts.safetensors train-00000.tokens ... index.json
    <folder>/data/tokenizers/<key>/         tokenizer.json of a global vocabulary
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from dept_ray.config import Job, Source, TokenizerSection
from dept_ray.draws import digest, generator
from dept_ray.errors import SourceError
from dept_ray.text import shards
from dept_ray.text.shards import ShardFile, Split
from dept_ray.text.tokenizer import end_of_text, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_BYTES = 8 << 20
"""Text in one part: a few seconds of tokenising, so that the tasks of one source share the cores."""
TokenizerKind = Literal["global", "own"]
Report = Callable[[str, int, int], None]
"""Called with (stage, done, of all)."""


@dataclass(frozen=True)
class Task:
    """One unit of work for one source; small and picklable."""

    source: Source
    folder: Path
    """Where the result goes."""
    text: Path
    """The source's text parts."""
    tokenizer: TokenizerSection | None = None
    part: str = ""
    sample_bytes: int = 0


class RunAll(Protocol):
    """Runs one function over tasks, anywhere, and gives the results in the order of the tasks."""

    def __call__(self, work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]: ...


def run_here(work: Callable[[Task], Any], tasks: list[Task], done: Callable[[int], None]) -> list[Any]:
    """One after the other in this process."""
    results = []
    for task in tasks:
        results.append(work(task))
        done(len(results))
    return results


def prepare(job: Job, kind: TokenizerKind, run_all: RunAll = run_here, report: Report = lambda stage, done, of: None) -> None:
    """Make the corpus of every source of a job, skipping what is there.

    Raises:
        SourceError, VocabularyError: the text, or the tokenizer asked for, cannot be had.
    """
    todo = [s for s in job.sources if not (corpus_folder(job, s.name, kind) / "index.json").exists()]
    if not todo:
        return

    def run(stage: str, work: Callable[[Task], Any], tasks: list[Task]) -> list[Any]:
        if tasks:
            report(stage, 0, len(tasks))
        return run_all(work, tasks, lambda n: report(stage, n, len(tasks))) if tasks else []

    def task(source: Source, **more: Any) -> Task:
        return Task(source, corpus_folder(job, source.name, kind), text_folder(job, source), job.tokenizer, **more)

    needed = todo if kind == "own" else list(job.sources)
    run("clean", clean, [task(s) for s in needed if not (text_folder(job, s) / "index.json").exists()])
    if kind == "own":
        run("learn", learn_own, [task(s, sample_bytes=job.tokenizer.sample_bytes) for s in todo])
    else:
        _learn_global(job, lambda tasks: run("learn", sample, tasks), task)
        blob = (global_tokenizer_folder(job) / "tokenizer.json").read_bytes()
        for source in todo:
            corpus_folder(job, source.name, kind).mkdir(parents=True, exist_ok=True)
            shards.write_atomically(corpus_folder(job, source.name, kind) / "tokenizer.json", blob)
    parts = [task(s, part=name) for s in todo for name in text_parts(text_folder(job, s))]
    run("pack", pack, parts)
    run("index", index, [task(s) for s in todo])


# ---------------------------------------------------------------------------------------------- where things are
def text_key(source: Source) -> str:
    """Digest of all that decides a source's text."""
    kept = source.model_dump(mode="json", exclude={"weight", "storage", "resources", "vocab_size", "tokens"})
    return digest(json.dumps(kept, sort_keys=True))


def text_folder(job: Job, source: Source) -> Path:
    """Cleaned text of one source."""
    return job.storage_of(source.name) / "data" / source.name / f"text-{text_key(source)}"


def _tokenizer_key(job: Job, texts: list[str]) -> str:
    kept = job.tokenizer.model_dump(mode="json", exclude={"vocabulary", "global_vocab_size"})
    return digest(json.dumps(kept, sort_keys=True), *texts)


def global_tokenizer_folder(job: Job) -> Path:
    """The tokenizer that all sources share."""
    return Path(job.folder) / "data" / "tokenizers" / _tokenizer_key(job, [text_key(s) for s in job.sources])


def corpus_folder(job: Job, name: str, kind: TokenizerKind) -> Path:
    """Prepared tokens of one source under its own or the global tokenizer."""
    source = job.source(name)
    key = _tokenizer_key(job, [text_key(source)]) if kind == "own" else global_tokenizer_folder(job).name
    return job.storage_of(name) / "data" / name / f"tokens-{digest(key, text_key(source))}"


def text_parts(folder: Path) -> list[str]:
    """Names of the parts of a cleaned text, training first."""
    index = json.loads((folder / "index.json").read_text())
    return [f"{split}-{i:05d}" for split in ("train", "validation") for i in range(index[split]["parts"])]


# ---------------------------------------------------------------------------------------------- the four stages
def clean(task: Task) -> None:
    """Read a source and write its text parts."""
    from dept_ray.text.sources import documents

    task.text.mkdir(parents=True, exist_ok=True)
    index = {split: {"parts": 0, "documents": 0, "bytes": 0} for split in ("train", "validation")}
    waiting: dict[Split, list[str]] = {"train": [], "validation": []}
    size = dict.fromkeys(waiting, 0)

    def write(split: Split) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        entry = index[split]
        path = task.text / f"{split}-{entry['parts']:05d}.parquet"
        pq.write_table(pa.table({"text": pa.array(waiting[split], pa.large_string())}), path, compression="zstd")
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


def read_part(path: Path) -> Iterator[str]:
    """Documents of one text part."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"]):
        yield from batch.column("text").to_pylist()


def sample(task: Task) -> list[str]:
    """Documents of a source's training text, whole parts in a drawn order, `sample_bytes` of them."""
    parts = [name for name in text_parts(task.text) if name.startswith("train")]
    texts: list[str] = []
    left = task.sample_bytes
    for i in generator("sample", task.source.name).permutation(len(parts)):
        for text in read_part(task.text / f"{parts[i]}.parquet"):
            if left <= 0:
                return texts
            piece = text.encode()[:left].decode(errors="ignore")
            texts.append(piece)
            left -= len(piece.encode())
    return texts


def learn_own(task: Task) -> None:
    """Make the tokenizer of one source from its own text."""
    assert task.tokenizer is not None
    if task.tokenizer.kind in ("file", "hub"):
        tokenizer = load_tokenizer(task.tokenizer)
    else:
        tokenizer = train_tokenizer(sample(task), task.tokenizer, f'source "{task.source.name}"')
    _save_tokenizer(tokenizer, task.folder)


def _learn_global(job: Job, run: Callable[[list[Task]], list[Any]], task: Callable[..., Task]) -> None:
    folder = global_tokenizer_folder(job)
    if (folder / "tokenizer.json").exists():
        return
    if job.tokenizer.kind in ("file", "hub"):
        _save_tokenizer(load_tokenizer(job.tokenizer), folder)
        return
    sizes = [json.loads((text_folder(job, s) / "index.json").read_text())["train"]["bytes"] for s in job.sources]
    shares = np.array(sizes, dtype=np.float64) ** job.tokenizer.temperature
    budgets = (job.tokenizer.sample_bytes * shares / shares.sum()).astype(int)
    texts = run([task(s, sample_bytes=int(b)) for s, b in zip(job.sources, budgets, strict=True)])
    _save_tokenizer(train_tokenizer((t for ts in texts for t in ts), job.tokenizer, "all sources"), folder)


def _save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())


def pack(task: Task) -> None:
    """Tokenise one text part into one shard; its counts and checksum stand beside it until the index is written."""
    from safetensors.numpy import save
    from tokenizers import Tokenizer

    done = task.folder / f"{task.part}.safetensors"
    if done.exists():
        return
    tokenizer = Tokenizer.from_file(str(task.folder / "tokenizer.json"))
    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    text_bytes = 0

    def encoded() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        batch: list[str] = []
        for text in read_part(task.text / f"{task.part}.parquet"):
            text_bytes += len(text.encode())
            batch.append(text)
            if len(batch) == 256:
                yield from _encode(tokenizer, batch)
                batch = []
        yield from _encode(tokenizer, batch)

    tokens, counts, checksum = shards.write_shard(
        task.folder / f"{task.part}.tokens", encoded(), end_of_text(tokenizer), dtype
    )
    about = {"tokens": str(tokens), "checksum": checksum, "text_bytes": str(text_bytes)}
    shards.write_atomically(done, save({"counts": counts}, metadata=about))


def _encode(tokenizer: "Tokenizer", texts: list[str]) -> Iterator[np.ndarray]:
    # encode_batch_fast skips offsets; special tokens of a loaded tokenizer are not wanted: shards place their own.
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield np.array(encoding.ids, dtype=np.uint32)


def index(task: Task) -> None:
    """Gather a source's shards into its index: now the corpus is a fact."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(task.folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    files: dict[Split, list[ShardFile]] = {"train": [], "validation": []}
    counts: dict[Split, np.ndarray] = {"train": np.zeros(size, np.int64), "validation": np.zeros(size, np.int64)}
    parts = text_parts(task.text)
    for part in parts:
        split: Split = "train" if part.startswith("train") else "validation"
        with safe_open(str(task.folder / f"{part}.safetensors"), framework="numpy") as opened:
            about, found = opened.metadata(), opened.get_tensor("counts")
        if len(found) > size:
            raise SourceError(f"{task.folder / part}.tokens holds id {len(found) - 1}, outside the {size} ids of its tokenizer")
        counts[split][: len(found)] += found
        files[split].append(ShardFile(f"{part}.tokens", int(about["tokens"]), about["checksum"], int(about["text_bytes"])))
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    shards.write_index(task.folder, files["train"], files["validation"], dtype=dtype,
                       end_of_text=end_of_text(tokenizer), counts=counts)  # fmt: skip
    for part in parts:
        (task.folder / f"{part}.safetensors").unlink(missing_ok=True)


def prepared_sizes(job: Job, kind: TokenizerKind, trimmed: bool) -> dict[str, dict[str, int]]:
    """`vocabulary_sizes` and `tokens` of those sources that are prepared, by name; for `study.plan`."""
    sizes: dict[str, dict[str, int]] = {"vocabulary_sizes": {}, "tokens": {}}
    for source in job.sources:
        folder = corpus_folder(job, source.name, kind)
        if (folder / "index.json").exists():
            corpus = shards.open_corpus(folder, verify=False)
            sizes["vocabulary_sizes"][source.name] = (corpus.trimmed if trimmed else corpus.vocabulary).size
            sizes["tokens"][source.name] = corpus.train.tokens
    return sizes
