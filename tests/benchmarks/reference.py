"""The model of reference, its text and its job: what all benchmarks of training train.

4 layers, width 256, 4 heads, context 256, a tied vocabulary of 8192, batches of 8 x 256, AdamW: 34.6 MFLOP a token. The
text is what is installed on this machine, so nothing is downloaded. The small size shows only that a benchmark runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dept_ray.config import Job
from dept_ray.jobfile import parse_job

COLLECTIONS = ("python", "docs", "cpp")


@dataclass(frozen=True)
class Size:
    """Of the model, of a measurement and of the text."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    text_bytes: int
    """Per source."""
    steps: int
    """Optimizer steps of one measurement, and of a round."""
    compile: bool

    @property
    def step_tokens(self) -> int:
        return self.batch * self.context

    @property
    def parameters(self) -> int:
        """Body, tokens and positions."""
        D = self.width
        return self.layers * (12 * D * D + 13 * D) + 2 * D + (self.vocabulary + self.context) * D


SIZES = {
    "full": Size(4, 256, 4, 256, 8192, 8, text_bytes=4_000_000, steps=50, compile=True),
    "small": Size(1, 32, 2, 32, 512, 2, text_bytes=60_000, steps=2, compile=False),
}


def job_of(size: Size, folder: Path, name: str, silos: int, steps: int, **more: Any) -> Job:
    """A job of `silos` equal silos: steady rounds, nothing but training in them (scores come at the very end).

    Args:
        size: of the model and the text.
        folder: of data and runs.
        name: of the run.
        silos: how many sources; they take the collections in turn.
        steps: of a round.
        more: top-level keys; of a section, only the keys to be changed.
    """
    values: dict[str, Any] = {
        "name": name,
        "folder": str(folder),
        "method": "spec-opt",
        "sources": [
            {
                "name": f"source{i}", "kind": "installed", "collection": COLLECTIONS[i % len(COLLECTIONS)],
                "max_bytes": size.text_bytes, "max_validation_bytes": 10_000,
            }
            for i in range(silos)
        ],
        "model": {"layers": size.layers, "width": size.width, "heads": size.heads},
        "tokenizer": {"vocab_size": size.vocabulary, "sample_bytes": size.text_bytes},
        "inner": {
            "local_steps": steps, "batch_size": size.batch, "context": size.context, "lr": 1e-3, "warmup_steps": 10,
            "compile": "always" if size.compile else "never",
        },
        "rounds": {"total": 100_000 // steps, "score_every": 0},
    }  # fmt: skip
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_job(values)


def text_job(size: Size, folder: Path) -> Job:
    """One source of more text than a model of this size would need: several parts, for tokenising."""
    name = "source0"
    source = {"name": name, "kind": "installed", "collection": "python", "max_bytes": 6 * size.text_bytes}
    sources = [{**source, "max_validation_bytes": 10_000}]
    return job_of(size, folder, "text", 1, 1, sources=sources)


def training_tokens(job: Job, source: str = "source0") -> Path:
    """A file of a source's prepared tokens (uint16), for those who read them by hand."""
    from dept_ray.rounds.methods import method_of
    from dept_ray.text.prepare import corpus_folder

    kind = "own" if method_of(job).vocabulary == "own" else "global"
    return corpus_folder(job, source, kind) / "train-00000.tokens"
