"""`dept-ray demo`: four silos on real text that every machine with this package has, and what decoupling bought.

Small enough for two CPU cores and two minutes. The same job under any of the seven methods sees the same number of tokens.
"""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dept_ray.config import Job, parse_job
from dept_ray.console import human
from dept_ray.metrics import Record
from dept_ray.rounds.methods import METHODS
from dept_ray.study.plan import DataParallel, plan_job

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
                "batch_size": 8, "context": 128, "lr": 3e-3, "warmup_steps": 50, "compile": "never",
            },
            "rounds": {"total": 12},
        },
        where="demo",
    )  # fmt: skip


def introduction(job: Job) -> RenderableType:
    """What is about to happen."""
    lines = [
        Text.assemble(("dept_ray demo: ", "bold"), f"method {job.method}, {len(job.sources)} sources that do not belong together"),
        *(Text(f"  {name:<7} {what}") for name, what in _TEXTS.items()),
    ]
    return Group(*lines, Text(""))


def summary(job: Job, records: list[Record]) -> RenderableType:
    """What was learnt, and what decoupling bought."""
    before = next((r for r in records if r["round"] == 1 and r.get("scores")), None)
    after = records[-1]
    if before is None or after["event"] != "scores":
        return Text("the run was stopped before its last round; the same command goes on")
    return Group(Text(""), _learnt(job, before, after), Text(""), _bought(job, records))


def _learnt(job: Job, before: Record, after: Record) -> Table:
    sizes = {source: silo.vocabulary_size for silo in plan_job(job).silos for source in (s.name for s in silo.sources)}
    table = Table(box=None, pad_edge=False, header_style="bold", title="Bits per byte of held-out text", title_justify="left")
    table.add_column("source")
    for name in ("vocabulary", "unigram model", "before training", "after training", "of unigram"):
        table.add_column(name, justify="right")
    ratios = []
    for source, end in after["scores"].items():
        unigram = end["unigram_bits_per_byte"]
        ratios.append(end["bits_per_byte"] / unigram)
        table.add_row(
            source, f"{sizes[source]:,}", f"{unigram:.3f}", f"{before['scores'][source]['bits_per_byte']:.3f}",
            f"{end['bits_per_byte']:.3f}", f"{ratios[-1]:.2f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("mean", "", "", f"{before['mean']['bits_per_byte']:.3f}", f"{after['mean']['bits_per_byte']:.3f}",
                  f"{sum(ratios) / len(ratios):.2f}", style="bold")  # fmt: skip
    return table


def _bought(job: Job, records: list[Record]) -> Table:
    """Measured bytes against those of a gradient exchange at each step with one global vocabulary."""
    planned = plan_job(job)
    parallel: Any = planned.data_parallel
    assert isinstance(parallel, DataParallel)
    rounds = [r for r in records if r["event"] == "round"]
    sent = sum(r["sent_bytes"]["down"] + r["sent_bytes"]["up"] for r in rounds)
    workers = len(job.sources)
    steps = sum(r["tokens"] for r in rounds[-1:]) // (workers * job.inner.batch_size * job.inner.context)
    would = workers * steps * parallel.step_bytes
    own = sum(silo.parameters.rows for silo in planned.silos) / len(planned.silos)
    saved = parallel.parameters.rows - own
    table = Table(box=None, pad_edge=False, header_style="bold", title="What decoupling bought", title_justify="left")
    table.add_column("")
    for name in ("data-parallel, one vocabulary", f"this run ({job.method})", "bought"):
        table.add_column(name, justify="right")
    times = f"{would / sent:,.0f} times less" if sent else "everything stayed home"
    table.add_row("bytes sent, all silos, both ways", human(would, "B"), human(sent, "B"), times)
    table.add_row("embedding parameters per silo", human(parallel.parameters.rows), human(own), f"{human(saved)} saved ({saved / parallel.parameters.rows:.0%})")
    return table
