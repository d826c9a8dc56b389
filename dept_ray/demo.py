"""`dept-ray demo`: four silos on real text that every machine with this package has, and what decoupling bought.

Small enough for two CPU cores and three minutes. Under any of the seven methods it sees the same number of tokens.
"""

from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dept_ray.config import Job
from dept_ray.console import figure_table, human
from dept_ray.jobfile import parse_job
from dept_ray.metrics import Record
from dept_ray.rounds.methods import METHODS, Method, method_of
from dept_ray.study.costs import Plan
from dept_ray.study.plan import plan_job

OWN_VOCABULARY = 1024
GLOBAL_VOCABULARY = 4096
_TEXTS = {
    "docs": "English docstrings and package descriptions",
    "python": "Python source code",
    "cpp": "C++ headers",
    "maths": "worked problems",
}


def demo_job(method: str | None = None, folder: str = "dept-demo") -> Job:
    """The demo's job under one of the methods (default: spec-opt)."""
    facts = METHODS[method or "spec-opt"]
    sources = [
        {"name": name, "kind": "installed", "collection": name, "max_bytes": 4_000_000, "max_validation_bytes": 40_000}
        for name in _TEXTS
    ]
    return parse_job(
        {
            "name": f"demo-{facts.name}",
            "method": facts.name,
            "folder": folder,
            "sources": sources,
            "model": {"layers": 4, "width": 128, "heads": 4},
            "tokenizer": {
                "vocab_size": OWN_VOCABULARY if facts.vocabulary == "own" else GLOBAL_VOCABULARY,
                "sample_bytes": 1_000_000 if facts.vocabulary == "own" else 4_000_000,
                "global_vocab_size": GLOBAL_VOCABULARY,
            },
            # One silo of all sources sees in a round what four silos of one see together.
            "inner": {
                "local_steps": 100 * (len(sources) if facts.mixed else 1),
                "batch_size": 8, "context": 128, "lr": 3e-3, "warmup_steps": 50, "compile": "never", "threads": 1,
            },
            "rounds": {"total": 4},
        },
        where="demo",
    )  # fmt: skip


def introduction(job: Job) -> RenderableType:
    """What is about to happen."""
    return Group(
        Text(f"dept_ray demo: {job.method.upper()}", style="bold"),
        Text(_in_words(method_of(job))),
        Text(""),
        Text(f"{len(job.sources)} sources that do not belong together"),
        *(Text(f"  {name:<7} {what}") for name, what in _TEXTS.items()),
        Text(""),
    )


def _in_words(method: Method) -> str:
    """What is decoupled."""
    if method.mixed:
        drawn = "; its embedding is drawn anew each round" if method.reset_embedding else ""
        return f"one model reads a mixture of all sources{drawn}"
    rows = {
        "global": "one vocabulary for all",
        "trimmed": "each silo keeps its part of one vocabulary",
        "own": "each silo has a tokenizer of its own",
    }[method.vocabulary]
    if not method.share_body:
        return f"{rows}; nothing travels"
    return f"{rows}; {'only the body travels' if method.share_rows == 'none' else 'body and embedding travel'}"


def summary(job: Job, records: list[Record]) -> RenderableType:
    """What was learnt, and what decoupling bought."""
    before = next((r for r in records if r["round"] == 1 and r.get("scores")), None)
    after = records[-1] if records else None
    if before is None or after is None or after["event"] != "scores":
        return Text("the run was stopped before its last round; the same command goes on")
    planned = plan_job(job)
    return Group(Text(""), _learnt(planned, before, after), Text(""), _bought(job, planned, records))


def _learnt(planned: Plan, before: Record, after: Record) -> Table:
    sizes = {source.name: silo.vocabulary_size for silo in planned.silos for source in silo.sources}
    table = figure_table(
        "What was learnt: bits per byte of held-out text",
        "source", "vocabulary", "before", "after", "unigram model", "after / unigram",
    )  # fmt: skip
    unigrams = {source: score["unigram_bits_per_byte"] for source, score in after["scores"].items()}
    ratios = {source: score["bits_per_byte"] / unigrams[source] for source, score in after["scores"].items()}
    for source, score in after["scores"].items():
        table.add_row(
            source, f"{sizes[source]:,}", f"{before['scores'][source]['bits_per_byte']:.3f}",
            f"{score['bits_per_byte']:.3f}", f"{unigrams[source]:.3f}", f"{ratios[source]:.0%}",
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "mean", "", f"{before['mean']['bits_per_byte']:.3f}", f"{after['mean']['bits_per_byte']:.3f}",
        f"{fmean(unigrams.values()):.3f}", f"{fmean(ratios.values()):.0%}", style="bold",
    )  # fmt: skip
    return table


def _bought(job: Job, planned: Plan, records: list[Record]) -> Table:
    """Measured bytes against those of a gradient exchange at each step with one global vocabulary."""
    parallel = planned.data_parallel
    assert parallel is not None, "the demo's job declares its global vocabulary"
    rounds = [record for record in records if record["event"] == "round"]
    sent = sum(record["sent_bytes"]["down"] + record["sent_bytes"]["up"] for record in rounds)
    workers = len(job.sources)
    steps = rounds[-1]["tokens"] // (workers * job.inner.batch_size * job.inner.context)
    would = workers * steps * parallel.step_bytes
    rows = fmean(silo.parameters.rows for silo in planned.silos)
    saved = 1 - rows / parallel.parameters.rows
    table = figure_table("What decoupling bought", "", "data-parallel", job.method.upper(), "")
    table.add_row(
        "sent by all, both ways", human(would, "B"), human(sent, "B"),
        f"{would / sent:,.0f} times less" if sent else "stays home",
    )  # fmt: skip
    table.add_row(
        "embedding parameters per silo", human(parallel.parameters.rows), human(rows),
        f"{saved:.0%} less" if saved else "the same",
    )  # fmt: skip
    table.caption = f"data-parallel: each step a gradient; a vocabulary of {parallel.vocabulary_size:,}"
    return table
