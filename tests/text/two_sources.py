"""Two sources of made-up words, a job that prepares them, and what it made of them."""

import json
from pathlib import Path
from typing import Any

from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.jobfile import parse_job
from dept_ray.text.prepare import TokenizerKind, corpus_folder
from dept_ray.text.shards import Corpus, open_corpus

KINDS: tuple[TokenizerKind, ...] = ("own", "global")
SYLLABLES = {"de": "ba lor zü ne ß", "en": "th os qui ing er"}


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Two sources of made-up words, some 15 kB each, validation named."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for name, syllables in SYLLABLES.items():
        draw = generator("test", name, seed)
        words = ["".join(draw.choice(syllables.split(), int(draw.integers(1, 4)))) for _ in range(400)]
        texts = [f"{name} {i}: " + " ".join(draw.choice(words, 60)) for i in range(count + 4)]
        for part, some in (
            ("train", texts[:count]),
            ("validation", [*texts[count:], f"only in validation: {name} \u2603"]),
        ):
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        tables.append(
            {
                "name": name,
                "kind": "files",
                "paths": str(folder / f"{name}-train.jsonl"),
                "validation_paths": str(folder / f"{name}-validation.jsonl"),
            }
        )
    return tables


def make_job(texts: list[dict[str, Any]], folder: Path, **tokenizer: Any) -> Job:
    return parse_job(
        {"name": "test", "folder": str(folder), "sources": texts, "tokenizer": {"vocab_size": 300, **tokenizer}}
    )


def corpora(job: Job, kind: TokenizerKind) -> dict[str, Corpus]:
    return {source.name: open_corpus(corpus_folder(job, source.name, kind)) for source in job.sources}


def fingerprints(job: Job, kind: TokenizerKind) -> dict[str, str]:
    return {name: corpus.fingerprint for name, corpus in corpora(job, kind).items()}


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
