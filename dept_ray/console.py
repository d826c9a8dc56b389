"""What a person sees in a terminal: a live table of a run, lines per round where output is piped, and final tables.

Draws only from `RunStatus` and records; knows nothing of training or of clusters. All of it is made for 80 columns:
rich has that width wherever output is piped, and a figure that wraps is not read.
"""

import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dept_ray.messages import RunStatus, SiloStatus
from dept_ray.metrics import Record

WIDTH = 80
_INDENT = 14
"""Columns of a line's label: `round    12   `."""
_TIMED_ROUNDS = 5
"""The time left follows the median of so many last rounds: an odd one does not move it."""
_OF_A_ROUND = ("loading", "scoring", "compiling", "training", "saving", "going ahead")
"""What no silo does between two rounds; who is asked seldom may have said it last."""


def human(number: float, unit: str = "") -> str:
    """Three digits and a letter.

    >>> human(278_715_648), human(85_056_000 * 4, "B"), human(500), human(12.34)
    ('279M', '340 MB', '500', '12.3')
    """
    letters = ("", "k", "M", "G" if unit else "B", "T")
    power = 0
    while abs(number) >= 999.5 and power < len(letters) - 1:
        number, power = number / 1000, power + 1
    whole = abs(number) >= 99.95 or (power == 0 and float(number).is_integer())
    digits = 0 if whole else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{' ' if unit else ''}{letters[power]}{unit}"


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or, from two days on, days and hours.

    >>> duration(75), duration(3723), duration(526_000)
    ('1:15', '1:02:03', '6 d 2 h')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def figure_table(title: str, *columns: str) -> Table:
    """An empty table whose first column is words and whose others are figures; the house's one look."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", caption_style="dim",
                  box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for number, column in enumerate(columns):  # where there is no room, words give way and figures do not
        table.add_column(
            column, justify="right" if number else "left", no_wrap=number > 0, overflow="ellipsis", vertical="bottom"
        )
    return table


# ------------------------------------------------------------------------------------------ lines of a piped run
def round_line(record: Record) -> Text:
    """One round (or the final scores) as lines of less than 80 columns.

    A round's scores were measured before its training, so they stand before it, in lines of their own.
    """
    if record["event"] == "change":
        what = ", ".join(f"{key} {value}" for key, value in record["change"].items() if not isinstance(value, dict))
        what = what or f"add {record['change']['add']['name']}"
        return Text(f"change       {what}" + (f": refused, {record['refused']}" if record.get("refused") else ""))
    if record["event"] == "scores":
        return Text(_bits("final", record))
    sent = record["sent_bytes"]
    rate = sum(silo["tokens"] for silo in record["silos"].values()) / max(record["seconds"], 1e-9)
    lines = [_bits(_label("before", record), record)] if record.get("scores") else []
    lines.append(
        _label("round", record) + f"loss {_figure(record['loss'], 4)}   {human(rate)} tokens/s   "
        f"sent {human(sent['down'] + sent['up'], 'B')}   {record['seconds']:.1f} s{_mfu('   ', record)}"
    )
    lines += [_filled("", told) for told in _losses(record)]
    return Text("\n".join(lines))


def _losses(record: Record) -> list[str]:
    """Who was lost in a round, for good or until it was made anew."""
    again = [(name, silo) for name, silo in record["silos"].items() if silo.get("lost")]
    told = [f"{name} made anew, {silo['steps']} steps since: {silo['lost']}" for name, silo in again]
    return told + [f"{name} left out: {reason}" for name, reason in record["refused"].items()]


def _mfu(before: str, record: Record) -> str:
    """Model FLOPs utilisation, the mean over silos whose devices' peak is known; else nothing."""
    known = [_flops_per_s(silo) / silo["peak_flops"] for silo in record["silos"].values() if silo.get("peak_flops")]
    return f"{before}{sum(known) / len(known):.0%} MFU" if known else ""


def _flops_per_s(silo: Record) -> float:
    """While it trained."""
    seconds = silo.get("seconds", {})
    return silo.get("flops", 0.0) / max(seconds.get("train", 0.0) + seconds.get("ahead", 0.0), 1e-9)


def ledger_table(record: Record) -> Table:
    """Who did what in a round: one line a silo, in 80 columns."""
    table = figure_table(
        f"ledger of round {record['round']}",
        "silo", "steps", "loss", "norm", "cosine", "bytes\ndown", "bytes\nup", "train\ns", "send\ns", "wait\ns",
    )  # fmt: skip
    for name, silo in record["silos"].items():
        seconds = silo.get("seconds", {})
        table.add_row(
            name, str(silo["steps"]), _figure(silo["loss"], 3), _number(silo.get("norm") or None, 2),
            _number(silo.get("cosine"), 2),
            human(silo["down_bytes"]), human(silo["up_bytes"]),
            *(_number(seconds.get(what), 1) for what in ("train", "send", "wait")),
        )  # fmt: skip
    rate = sum(_flops_per_s(silo) for silo in record["silos"].values())
    told = [f"while they trained: {human(rate, 'FLOP/s')}{_mfu(', ', record)}"] if rate else []
    told += _losses(record)
    told += [
        f"{name} left out of attempt {each['attempt'] + 1}: {reason}"
        for each in record.get("failed", [])
        for name, reason in each["refused"].items()
    ]
    told += [f"{name} away: {reason}" for name, reason in record.get("away", {}).items()]
    table.caption = "\n".join(told) or None
    return table


def _label(word: str, record: Record) -> str:
    return f"{word:<6}{record['round']:>5}".ljust(_INDENT)


def _bits(label: str, record: Record) -> str:
    """Bits per byte: the mean and, where there are several sources, each: beside it, or in aligned columns below.

    A source with a star is held out: it is not in the mean. A dash stands where nothing was scored.
    """
    bits = {
        source + "*" * score.get("held_out", False): _figure(score["bits_per_byte"], 3)
        for source, score in record["scores"].items()
    }
    first = f"{label:<{_INDENT}}{_figure(record['mean']['bits_per_byte'], 3)} bits/byte"
    if len(bits) < 2:
        return first
    beside = f"{first}: {', '.join(f'{source} {figure}' for source, figure in bits.items())}"
    if len(beside) < WIDTH:
        return beside
    name, value = max(map(len, bits)), max(map(len, bits.values()))
    cells = [f"{source:<{name}} {figure:>{value}}" for source, figure in bits.items()]
    per_line = max(1, (WIDTH - 1 - _INDENT + 3) // (name + 1 + value + 3))
    rows = ["   ".join(cells[i : i + per_line]) for i in range(0, len(cells), per_line)]
    return "\n".join([first, *(" " * _INDENT + row for row in rows)])


def _filled(label: str, words: str) -> str:
    """Words under a hanging label; what cannot be cut, such as a path, is not."""
    margin = " " * _INDENT
    return textwrap.fill(words, WIDTH - 1, initial_indent=label.ljust(_INDENT), subsequent_indent=margin,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


# ------------------------------------------------------------------------------------------ the live table
def live_table(status: RunStatus, records: list[Record], began: float | None = None) -> RenderableType:
    """A run in progress: its headline and a line per silo.

    Args:
        status: of now.
        records: of all rounds so far.
        began: `time.monotonic()` when somebody began to watch; None: nobody did, and no time is told.
    """
    rounds = [record for record in records if record["event"] == "round"]
    bits = _latest_bits(records)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("silo", overflow="ellipsis")  # gives way where there is no room, and the figures do not
    table.add_column("doing", no_wrap=True, min_width=8)
    for name, width in (("step", 5), ("loss", 6), ("bits/byte", 9), ("tokens/s", 8), ("epochs", 6), ("sent", 7)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    silos = status.silos or {name: SiloStatus(name, "") for record in rounds for name in record["silos"]}
    rate, sent = 0.0, 0
    for name, silo in sorted(silos.items()):
        if status.phase == "paused" and silo.doing in _OF_A_ROUND:
            silo = replace(silo, doing="waiting")
        mine = [record["silos"][name] for record in rounds if name in record["silos"]]
        last = mine[-1] if mine else {}
        training = silo.trains
        sources = last.get("epochs", {name: math.nan})
        my_sent = sum(round["down_bytes"] + round["up_bytes"] for round in mine)
        my_rate = silo.tokens_per_s if training else 0.0
        rate, sent = rate + my_rate, sent + my_sent
        table.add_row(
            name, silo.doing, f"{silo.step}/{silo.steps}" if training else "",
            _number(silo.loss if _of_now(silo, status) else last.get("loss"), 3),
            _number(_mean([bits[source] for source in sources if source in bits]), 3),
            human(my_rate) if my_rate else "", _number(max(sources.values()), 2),
            human(my_sent, "B") if my_sent else "",
        )  # fmt: skip
    if len(silos) > 1:
        table.add_row(
            "all", "", "", _number(rounds[-1]["loss"], 3) if rounds else "", _number(_mean(list(bits.values())), 3),
            human(rate) if rate else "", "", human(sent, "B") if sent else "", style="bold",
        )  # fmt: skip
    return Group(_headline(status, rounds, began), table)


def _of_now(silo: SiloStatus, status: RunStatus) -> bool:
    """Whether the loss that a silo tells is of a round that the ledger does not have yet."""
    return math.isfinite(silo.loss) and silo.round >= status.round and not status.over


def _headline(status: RunStatus, rounds: list[Record], began: float | None) -> RenderableType:
    done = status.round + _share_of_round(status)
    if status.over or status.round >= status.rounds:
        where = f"{status.round} of {status.rounds} rounds"
    else:
        where = f"round {status.round + 1} of {status.rounds}"
    times = [] if began is None else [f"{duration(time.monotonic() - began)} so far"]
    left = seconds_left(status, rounds)
    if left is not None:
        times.append(f"about {duration(left)} left")
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(status.run, "bold").append(f"  {status.phase}  {where}  ").append(", ".join(times), "dim")
    bar = ProgressBar(total=max(1, status.rounds), completed=min(done, status.rounds), width=WIDTH - 4)
    return Group(text, Padding(bar, (0, 0, 1, 0)))


def seconds_left(status: RunStatus, rounds: list[Record]) -> float | None:
    """Time until the last round is done, at the pace of the latest ones; None: nothing to go by, or nothing left."""
    recent = [record["seconds"] for record in rounds[-_TIMED_ROUNDS:]]
    if not recent or status.over or status.round >= status.rounds:
        return None
    return (status.rounds - status.round - _share_of_round(status)) * median(recent)


def _share_of_round(status: RunStatus) -> float:
    """How far the round in progress is, as the mean over the silos that work in it."""
    shares = [
        1.0
        if silo.doing in ("saving", "waiting", "going ahead")  # of the next round
        else silo.step / silo.steps
        if silo.doing == "training"
        else 0.0
        for silo in status.silos.values()
        if silo.steps and silo.round == status.round
    ]
    return 0.0 if status.over else _mean(shares) if shares else 0.0


def _latest_bits(records: list[Record]) -> dict[str, float]:
    """Bits per byte of each source when it was last measured: silos that rest are not measured every time."""
    bits = {source: s["bits_per_byte"] for record in records for source, s in record.get("scores", {}).items()}
    return {source: value for source, value in bits.items() if value is not None and math.isfinite(value)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else ""


def _figure(value: float | None, digits: int) -> str:
    """A figure that is looked for: a dash where there is none."""
    return _number(value, digits) or "–"


def watch(
    console: Console, status: Callable[[], RunStatus], new_records: Callable[[int], list[Record]],
    every_s: float = 0.5, since: int = 0, held: bool = False,
) -> tuple[RunStatus, list[Record]]:  # fmt: skip
    """Show a run until it is over: a live table on a terminal, else lines per round.

    Args:
        console: to show it on.
        status: asks the run how it is.
        new_records: its records from a number on.
        every_s: between two questions.
        since: number of the first record to be told in a line.
        held: until it is paused, too.

    Returns:
        The last status and all records.
    """
    records: list[Record] = new_records(0)[:since] if since else []
    began = time.monotonic()
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, refresh_per_second=4) as live:
            while True:
                now = status()
                records += new_records(len(records))
                live.update(live_table(now, records, began), refresh=True)
                if now.over or (held and now.phase == "paused"):
                    return now, records
                time.sleep(every_s)
    told = dict[str, str]() if since == 0 else None
    while True:
        now = status()
        fresh = new_records(len(records))
        records += fresh
        told = now.hardware if told is None else told
        at_work = fresh or any(silo.round >= 0 for silo in now.silos.values())  # until then they come one by one
        if at_work and (new := {silo: what for silo, what in now.hardware.items() if told.get(silo) != what}):
            told = {**told, **new}
            console.print(Text(hardware_line(new)), soft_wrap=True)
        for record in fresh:
            console.print(round_line(record), soft_wrap=True)
        if now.over or (held and now.phase == "paused"):
            return now, records
        time.sleep(every_s)


def hardware_line(hardware: Mapping[str, str]) -> str:
    """What the silos run on, those that are alike together."""
    alike: dict[str, list[str]] = {}
    for silo, what in sorted(hardware.items()):
        alike.setdefault(what, []).append(silo)
    return "\n".join(
        _filled(f"{len(names)} silo{'s' * (len(names) > 1)}", f"{what}: {', '.join(names)}")
        for what, names in alike.items()
    )


# ------------------------------------------------------------------------------------------ final tables
def score_table(record: Record, title: str) -> Table:
    """Validation per source, with both means; "minus unigram" is nats/token less those of the unigram model."""
    table = figure_table(
        title,
        "source", "nats/token", "perplexity", "bits/byte", "unigram\nbits/byte", "minus\nunigram", "tokens",
    )  # fmt: skip
    for source, s in record["scores"].items():
        told = f"{source} (held out)" if s.get("held_out") else source
        table.add_row(
            told, _figure(s["loss"], 4), _figure(s["perplexity"], 1), _figure(s["bits_per_byte"], 4),
            _figure(s["unigram_bits_per_byte"], 4), _figure(s["normalised"], 4), human(s["tokens"]),
        )  # fmt: skip
    mean = record["mean"]
    table.add_section()
    table.add_row("mean", "", _figure(mean["perplexity"], 1), _figure(mean["bits_per_byte"], 4), style="bold")
    table.add_row("as one text", _figure(mean["pooled_loss"], 4), "", _figure(mean["pooled_bits_per_byte"], 4))
    if aside := record.get("mean_held_out"):
        table.add_row("mean of held out", "", _figure(aside["perplexity"], 1), _figure(aside["bits_per_byte"], 4))
    if not record["scores"] and not record.get("refused"):
        table.caption = "no validation text: give a source validation_paths, or a validation_share"
    return table


def text_table(score: Record, unigram_bits: Mapping[str, float], cannot: Sequence[str], what: str) -> Table:
    """One text under one source's model, and under every source's unigram model, by which the source was chosen.

    Args:
        score: source, and the figures of a record's `scores`.
        unigram_bits: bits per byte by source, the least first.
        cannot: sources that have no row for one of its tokens.
        what: the text's name.
    """
    table = figure_table(what, "source", "unigram\nbits/byte", "model\nbits/byte", "perplexity", "tokens")
    for source, bits in unigram_bits.items():
        mine = source == score["source"]
        figures = (
            (_figure(score["bits_per_byte"], 4), _figure(score["perplexity"], 1), human(score["tokens"]))
            if mine
            else ()
        )
        table.add_row(source, f"{bits:.4f}", *figures, style="bold" if mine else None)
    if cannot:
        table.caption = f"no row for one of its tokens: {', '.join(cannot)}"
    return table
