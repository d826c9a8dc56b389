"""What a person sees in a terminal: a live table of a run, a line per round where there is no terminal, and final tables.

Draws only from `RunStatus` and records; knows nothing of training or of clusters.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dept_ray.messages import RunStatus
from dept_ray.metrics import Record


def human(number: float, unit: str = "") -> str:
    """A number as a person would say it.

    >>> human(1234567), human(2.5e9, "B"), human(12)
    ('1.23M', '2.50GB', '12')
    """
    for factor, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{letter}{unit}" if abs(number) / factor >= 100 else f"{number / factor:.2f}{letter}{unit}"
    return f"{number:.0f}{unit}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> duration(75), duration(3723)
    ('1:15', '1:02:03')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def round_line(record: Record) -> str:
    """One round (or the final scores) as one line."""
    if record["event"] == "scores":
        return f"final        bits/byte {_bits(record)}"
    sent = record["sent_bytes"]
    rate = sum(s["tokens"] for s in record["silos"].values()) / max(record["seconds"], 1e-9)
    line = (
        f"round {record['round']:>4}   loss {record['loss']:.4f}   {human(rate)} tokens/s   "
        f"sent {human(sent['down'] + sent['up'], 'B')}   {record['seconds']:.1f} s"
    )
    if record.get("scores"):
        line += f"   before: bits/byte {_bits(record)}"
    for silo, reason in record["refused"].items():
        line += f"\n             {silo} left out: {reason}"
    return line


def _bits(record: Record) -> str:
    each = "  ".join(f"{source} {score['bits_per_byte']:.3f}" for source, score in record["scores"].items())
    return f"{record['mean']['bits_per_byte']:.3f} ({each})"


def live_table(status: RunStatus, records: list[Record], began: float) -> RenderableType:
    """The table of a run in progress."""
    rounds = [record for record in records if record["event"] == "round"]
    last = rounds[-1] if rounds else None
    scored = next((record for record in reversed(records) if record.get("scores")), None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("silo", "left"), ("doing", "left"), ("step", "right"), ("loss", "right"),
                          ("bits/byte", "right"), ("tokens/s", "right"), ("epochs", "right"), ("sent", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, silo in sorted(status.silos.items()):
        of_round = last["silos"].get(name, {}) if last else {}
        loss = silo.loss if math.isfinite(silo.loss) else of_round.get("loss", math.nan)
        sent = sum(r["silos"][name]["down_bytes"] + r["silos"][name]["up_bytes"] for r in rounds if name in r["silos"])
        sources = of_round.get("epochs", {name: math.nan})
        bits = [scored["scores"][s]["bits_per_byte"] for s in sources if s in scored["scores"]] if scored else []
        table.add_row(
            name, silo.doing, f"{silo.step}/{silo.steps}" if silo.steps else "", _number(loss, 3),
            _number(sum(bits) / len(bits), 3) if bits else "", human(silo.tokens_per_s) if silo.tokens_per_s else "",
            _number(max(sources.values()), 2), human(sent, "B") if sent else "",
        )  # fmt: skip
    return Group(_headline(status, rounds, began), table)


def _headline(status: RunStatus, rounds: list[Record], began: float) -> RenderableType:
    within = [silo.step / silo.steps for silo in status.silos.values() if silo.steps and silo.round == status.round]
    done = status.round + (sum(within) / len(within) if within else 0.0)
    recent = [record["seconds"] for record in rounds[-5:]]
    left = duration((status.rounds - done) * sum(recent) / len(recent)) if recent else "?"
    text = Text.assemble(
        (f"{status.run} ", "bold"), f"{status.phase}  round {min(status.round + 1, status.rounds)} of {status.rounds}  ",
        f"{duration(time.monotonic() - began)} so far, {left} left",
    )  # fmt: skip
    return Group(text, ProgressBar(total=max(1, status.rounds), completed=min(done, status.rounds), width=60))


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def watch(
    console: Console, status: Callable[[], RunStatus], new_records: Callable[[int], list[Record]], every_s: float = 0.5
) -> tuple[RunStatus, list[Record]]:
    """Show a run until it is over: a live table on a terminal, else a line per round.

    Returns:
        The last status and all records.
    """
    records: list[Record] = []
    began, shown = time.monotonic(), ""
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, refresh_per_second=4) as live:
            while True:
                now = status()
                records += new_records(len(records))
                live.update(live_table(now, records, began), refresh=True)
                if now.over:
                    return now, records
                time.sleep(every_s)
    while True:
        now = status()
        fresh = new_records(len(records))
        records += fresh
        if now.hardware and not shown:
            shown = ", ".join(f"{silo}: {what}" for silo, what in sorted(now.hardware.items()))
            console.print(f"silos: {shown}", highlight=False)
        for record in fresh:
            console.print(round_line(record), highlight=False)
        if now.over:
            return now, records
        time.sleep(every_s)


def score_table(record: Record, title: str) -> Table:
    """Validation per source, with both means."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    for name in ("nats/token", "perplexity", "bits/byte", "unigram bits/byte", "CE - unigram CE", "tokens"):
        table.add_column(name, justify="right")
    for source, s in record["scores"].items():
        table.add_row(
            source, f"{s['loss']:.4f}", f"{s['perplexity']:.1f}", f"{s['bits_per_byte']:.4f}",
            f"{s['unigram_bits_per_byte']:.4f}", f"{s['normalised']:.4f}", f"{s['tokens']:,}",
        )  # fmt: skip
    mean = record["mean"]
    table.add_section()
    table.add_row("mean of sources", "", f"{mean['perplexity']:.1f}", f"{mean['bits_per_byte']:.4f}")
    table.add_row("all as one text", f"{mean['pooled_loss']:.4f}", "", f"{mean['pooled_bits_per_byte']:.4f}")
    return table


def key_values(rows: Iterable[tuple[str, Any]]) -> Table:
    """Two quiet columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for key, value in rows:
        table.add_row(key, str(value))
    return table
