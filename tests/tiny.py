"""The smallest real job: three little languages that share letters and no words, a model of one block, seconds a run.

Nothing is mocked: `tiny_job` is a job like any other. Its text is generated from labels, so that it is the same on
every machine. A session prepares it once (fixture `prepared`) and every run shares it (fixture `tiny`, in conftest.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.jobfile import parse_job
from dept_ray.messages import RoundOrder, SiloCard, SiloUpdate
from dept_ray.preparing import prepare
from dept_ray.silo.snapshot import snapshot_name
from dept_ray.study.study_file import Study

SOURCES = ("code", "latin", "numbers")
DOCUMENTS, HELD_OUT = 60, 3
"""Per source; about 1 kB each."""


def tiny_job(folder: Path, method: str = "spec-opt", *, text: Path | None = None, **overrides: Any) -> Job:
    """A job of three sources, three rounds of four steps.

    Args:
        folder: of the run; also of the text unless `text` says otherwise.
        method: one of the seven.
        text: where `write_texts` puts (or has put) the raw text.
        overrides: top-level keys; of a section, only the keys to be changed.
    """
    values: dict[str, Any] = {
        "name": f"tiny-{method}",
        "method": method,
        "folder": str(folder),
        "sources": write_texts(text or folder / "text"),
        "model": {"layers": 1, "width": 32, "heads": 2},
        "tokenizer": {"vocab_size": 300},
        "inner": {
            "local_steps": 4, "batch_size": 4, "context": 32, "lr": 1e-2, "warmup_steps": 2, "precision": "fp32",
            "compile": "never", "threads": 1,
        },
        "rounds": {"total": 3},
    }  # fmt: skip
    for key, value in overrides.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_job(values)


def ready_job(prepared: Path, folder: Path, method: str, **overrides: Any) -> Job:
    """A tiny job whose run has `folder` to itself and whose text is that of `prepared` (a fixture)."""
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(prepared / "data", target_is_directory=True)
    job = tiny_job(folder, method, text=prepared / "text", **overrides)
    prepare(job, local=True)  # nothing to do, unless an override asks for other tokens
    return job


def tiny_study(folder: Path, variants: dict[str, Any], held_out: tuple[str, ...] = (), **more: Any) -> Study:
    """A study `s` of the tiny job, in a folder that also holds its text; `more` are keys of the study."""
    job = tiny_job(folder).model_dump(mode="json", exclude_unset=True, exclude={"name", "folder"})
    for source in job["sources"]:
        source["held_out"] = source["name"] in held_out
    return Study.model_validate({"name": "s", "folder": str(folder), "job": job, "variants": variants, **more})


def write_texts(folder: Path) -> list[dict[str, Any]]:
    """Write each source's documents, where that is due, as txt or jsonl; the `[[sources]]` that read them."""
    tables: list[dict[str, Any]] = []
    for name in SOURCES:
        table: dict[str, Any] = {"name": name, "kind": "files"}
        for key, which in (("paths", range(DOCUMENTS)), ("validation_paths", range(DOCUMENTS, DOCUMENTS + HELD_OUT))):
            at = folder / name / key
            table[key] = str(at / ("*.txt" if name == "latin" else "all.jsonl"))
            if not at.exists():
                at.mkdir(parents=True)
                texts = {i: document(name, i) for i in which}
                if name == "latin":  # one txt file is one document
                    for i, text in texts.items():
                        (at / f"{i:03d}.txt").write_text(text, encoding="utf-8")
                else:
                    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts.values())
                    (at / "all.jsonl").write_text(lines, encoding="utf-8")
        tables.append(table)
    return tables


def document(source: str, number: int) -> str:
    """About 1 kB of one of the little languages, by its number."""
    draw = generator("tiny", source, number)

    def pick(words: str) -> str:
        several = words.split()
        return several[draw.integers(len(several))]

    def pieces() -> Iterator[str]:
        while True:
            if source == "numbers":
                tens, ones = pick("twenty thirty forty fifty sixty seventy eighty ninety"), pick(_ONES)
                yield f"{pick(_ONES)} hundred and {tens}-{ones}, "
            elif source == "code":
                a, b = pick("x y key self.total"), pick("0 1 len(x) y[i]")
                yield f"{'    ' * int(draw.integers(3))}{pick('if while return')} {a} {pick('+ - == <=')} {b}:\n"
            else:
                yield "".join(pick("qui lor ram set nis ave do mi bus ec") for _ in range(draw.integers(1, 4))) + pick(
                    "us. um ae it"
                )
                yield " "

    text = ""
    for piece in pieces():
        text += piece
        if len(text) >= 1000:
            return text
    raise AssertionError


def an_answer(
    silo: str, tokens: int = 8, body: Any = None, rows: Any = None, *, order: RoundOrder | None = None, **more: Any
) -> SiloUpdate:
    """A silo's answer without a silo: to `order`, or to an order of round 0 that names nothing."""
    fence = (order.run, order.round, order.life, order.attempt, order.fingerprint) if order else ("tiny", 0, 0, 0, "")
    values: dict[str, Any] = dict(zip(("run", "round", "life", "attempt", "fingerprint"), fence, strict=True)) | {
        "silo": silo, "steps": 1, "tokens": tokens, "loss": 1.0,
        "body": None if body is None else np.asarray(body, np.float32),
        "rows": None if rows is None else np.asarray(rows, np.float32),
    }  # fmt: skip
    values |= more
    began = order.position.get(silo, 0) if order else 0
    values.setdefault("position", {silo: began + values["steps"]})
    values.setdefault("snapshot", snapshot_name(*(values[key] for key in ("round", "life", "attempt"))))
    return SiloUpdate(**values)


def a_card(silo: str, owned: list[int] | None = None, vocabulary: int = 0) -> SiloCard:
    """A silo's card without a silo: who owns rows `owned` of `vocabulary` (None: all)."""
    size = vocabulary if owned is None else len(owned)
    ids = None if owned is None else np.array(owned, np.int64)
    return SiloCard(silo, (silo,), size, {silo: 1000}, ids, vocabulary, {silo: f"tokens-of-{silo}"})


_ONES = "one two three four five six seven eight nine"
