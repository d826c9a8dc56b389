"""What a person sees fits 80 columns, says what was recorded, and estimates sanely."""

import doctest
import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

import dept_ray.console as module
from dept_ray.console import (
    duration,
    hardware_line,
    human,
    ledger_table,
    live_table,
    round_line,
    score_table,
    seconds_left,
    watch,
)
from dept_ray.demo import demo_job, introduction, summary
from dept_ray.messages import RunStatus, SiloStatus
from dept_ray.rounds.methods import METHODS

FOUR = ("cpp", "docs", "maths", "python")
TEN = ("arabic", "chinese", "english", "german", "greek", "hindi", "indonesian", "italian", "swahili", "urdu")
PILE = (*FOUR, "dm_mathematics", "enron_emails", "pubmed_abstracts", "stackexchange", "philpapers", "uspto", "x")


def shown(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(what)
    return console.export_text()


def score(bits: float) -> dict[str, float]:
    return {"loss": bits, "perplexity": math.exp(bits), "bits_per_byte": bits, "unigram_bits_per_byte": bits + 0.5,
            "normalised": -0.8, "tokens": 1_234_567, "text_bytes": 4_000_000}  # fmt: skip


def scored(sources: tuple[str, ...]) -> dict[str, Any]:
    scores = {source: score(2 + i / 7) for i, source in enumerate(sources)}
    mean = sum(s["bits_per_byte"] for s in scores.values()) / len(scores)
    means = {"bits_per_byte": mean, "perplexity": 1234.5, "pooled_bits_per_byte": mean, "pooled_loss": 3.2}
    return {"scores": scores, "mean": means}


def a_round(
    number: int, sources: tuple[str, ...] = FOUR, seconds: float = 60.0, scores: bool = True, **more: Any
) -> dict[str, Any]:
    silo = {"tokens": 102_400, "steps": 100, "loss": 3.21, "down_bytes": 3_000_000, "up_bytes": 3_000_000}
    silos = {source: {**silo, "epochs": {source: 0.123 * number}} for source in sources}
    sent = {"down": 3_000_000 * len(sources), "up": 3_000_000 * len(sources)}
    record = {
        "event": "round", "run": "demo", "round": number, "attempt": 0, "seconds": seconds, "loss": 3.21,
        "tokens": 409_600 * number, "sent_bytes": sent, "silos": silos, "refused": {},
    }  # fmt: skip
    return {**record, **(scored(sources) if scores else {}), **more}


def final(sources: tuple[str, ...] = FOUR, round: int = 9) -> dict[str, Any]:
    return {"event": "scores", "run": "demo", "round": round, **scored(sources)}


def status(
    sources: tuple[str, ...] = FOUR, round: int = 2, rounds: int = 9, step: int = 50, doing: str = "training",
    phase: str = "training", **more: Any,
) -> RunStatus:  # fmt: skip
    silos = {name: SiloStatus(name, doing, round, step, 100, 3.456, 12_345.6) for name in sources}
    return RunStatus("demo-spec-opt", phase, round, rounds, silos=silos, **more)


# Numbers.


def test_numbers_have_three_digits():
    assert [human(n) for n in (0, 7, 999, 999_600, 85_056_000)] == ["0", "7", "999", "1.00M", "85.1M"]
    assert human(1_725_030_400) == "1.73B"
    assert [human(n, "B") for n in (0, 340_224_000, 1.2e9, 2.23e12)] == ["0 B", "340 MB", "1.20 GB", "2.23 TB"]
    assert [duration(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(module).failed == 0


# Lines.


def test_a_round_is_one_line_and_its_scores_stand_before_it():
    alone = "round     3   loss 3.2100   6.83k tokens/s   sent 24.0 MB   60.0 s"
    assert str(round_line(a_round(3, scores=False))) == alone
    first, second = str(round_line(a_round(3))).splitlines()
    assert first == "before    3   2.214 bits/byte: cpp 2.000, docs 2.143, maths 2.286, python 2.429"
    assert second == alone
    assert str(round_line(final(("a",)))) == "final         2.000 bits/byte"


@pytest.mark.parametrize("sources", [FOUR, TEN, PILE, ("a" * 90, "b")])
def test_lines_never_wrap_at_80_columns(sources):
    for record in (a_round(1234, sources), final(sources)):
        text = str(round_line(record))
        assert all(len(line) < 80 for line in text.splitlines()) or sources[0] == "a" * 90
        assert shown(round_line(record)).splitlines() == text.splitlines() or sources[0] == "a" * 90
        assert all(f"{s['bits_per_byte']:.3f}" in text for s in record["scores"].values())


def test_many_sources_stand_in_columns():
    lines = str(round_line(a_round(3, TEN))).splitlines()
    assert len(lines) == 1 + 4 + 1
    ends = {line.index(" 2.") for line in lines[1:4]} | {line.index(" 3.") for line in lines[4:5]}
    assert len(ends) == 1, "figures below each other"


def nothing_scored(number: float | None) -> dict[str, Any]:
    """The last record of a run without validation text: nan as it is made, None as it is read."""
    mean = dict.fromkeys(("bits_per_byte", "perplexity", "pooled_bits_per_byte", "pooled_loss"), number)
    return {"event": "scores", "run": "demo", "round": 9, "scores": {}, "mean": mean}


@pytest.mark.parametrize("number", [math.nan, None])
def test_a_dash_stands_where_nothing_was_scored(number: float | None):
    record = nothing_scored(number)
    assert str(round_line(record)) == "final         – bits/byte"
    lines = shown(score_table(record, "title")).splitlines()
    assert [line.split() for line in lines[-3:-1]] == [["mean", "–", "–"], ["as", "one", "text", "–", "–"]]
    assert lines[-1].startswith("no validation text: ")
    assert "no validation text" not in shown(score_table({**record, "refused": {"de": "not there"}}, "title"))
    aside = {**final(("irc",)), "mean": record["mean"], "mean_held_out": final(("irc",))["mean"]}
    aside["scores"]["irc"] |= {"held_out": True, "perplexity": number}
    assert str(round_line(aside)) == "final         – bits/byte"
    told = [line.split() for line in shown(score_table(aside, "title")).splitlines()]
    assert ["mean", "–", "–"] in told
    assert ["irc", "(held", "out)", "2.0000", "–", "2.0000", "2.5000", "-0.8000", "1.23M"] in told


def test_a_round_without_figures_has_dashes():
    record = a_round(1, ("a",), loss=None)
    record["silos"]["a"]["loss"] = None
    record["scores"]["a"]["bits_per_byte"] = None
    assert "loss –   " in str(round_line(record))
    assert shown(ledger_table(record)).splitlines()[-1].split()[:3] == ["a", "100", "–"]
    assert "nan" not in shown(live_table(status(("a",)), [record], 0.0))


def test_a_silo_left_out_is_told_with_its_reason_as_it_is():
    reason = "SiloError: answers ('run', [/b]) and not [red]what was asked[/red], " + "at length " * 10
    text = shown(round_line(a_round(1, refused={"docs": reason})))
    assert "".join(reason.split()) in "".join(text.split()), "brackets are no markup"
    assert all(len(line) < 80 for line in text.splitlines())


def test_a_silo_that_was_made_anew_within_a_round_is_told_with_its_reason():
    record = a_round(1)
    record["silos"]["docs"] |= {"steps": 12, "lost": "SiloError: ActorDied"}
    assert "docs made anew, 12 steps since: SiloError: ActorDied" in shown(round_line(record))


def test_hardware_that_is_alike_is_told_once():
    assert hardware_line(dict.fromkeys(FOUR, "cpu, bf16")) == "4 silos       cpu, bf16: cpp, docs, maths, python"
    assert hardware_line({"a": "cuda", "b": "cpu"}).splitlines() == ["1 silo        cuda: a", "1 silo        cpu: b"]


# The live table.


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("sources", [FOUR, TEN, PILE])
def test_the_live_table_fits(width, sources):
    now = status(sources, round=1234, rounds=9999, step=100)
    text = shown(live_table(now, [a_round(n, sources) for n in range(1, 1235)], 0.0), width)
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + 1 + len(sources) + 1, "headline, bar, blank, header, silos, all"
    assert all(len(line) <= width for line in lines)
    if (width, sources) != (80, PILE):
        assert "…" not in text
    assert text.count("7.40 GB") == len(sources), "names give way, figures do not"


def test_the_live_table_says_what_is_known():
    lines = shown(live_table(status(), [a_round(1), a_round(2, scores=False)], 0.0)).splitlines()
    assert lines[0].startswith("demo-spec-opt  training  round 3 of 9  ")
    assert lines[0].endswith("about 6:30 left")
    header, docs, everybody = lines[3], lines[5].split(), lines[-1].split()
    assert header.split() == ["silo", "doing", "step", "loss", "bits/byte", "tokens/s", "epochs", "sent"]
    assert docs == ["docs", "training", "50/100", "3.456", "2.143", "12.3k", "0.25", "12.0", "MB"]
    assert everybody == ["all", "3.210", "2.214", "49.4k", "48.0", "MB"]


def row_of(name: str, now: RunStatus, records: list[dict[str, Any]]) -> list[str]:
    (line,) = (line for line in shown(live_table(now, records)).splitlines() if line.startswith(name))
    return line.split()


def test_a_live_loss_is_of_the_round_in_progress_or_that_of_the_ledger_stands():
    silo = SiloStatus("a", "training", 1, 50, 100, 9.999, 1.0)
    assert row_of("a", RunStatus("demo", "training", 1, 9, silos={"a": silo}), [a_round(1, ("a",))])[3] == "9.999"
    later = RunStatus("demo", "training", 2, 9, silos={"a": silo})
    assert row_of("a", later, [a_round(1, ("a",)), a_round(2, ("a",))])[3] == "3.210", "it was read a round ago"
    unread = RunStatus("demo", "training", 1, 9, silos={"a": replace(silo, loss=math.nan)})
    assert row_of("a", unread, [a_round(1, ("a",))])[3] == "3.210"


def test_a_silo_of_a_paused_run_waits():
    assert row_of("cpp", status(phase="paused", step=0), [a_round(1), a_round(2)])[:3] == ["cpp", "waiting", "3.456"]
    text = shown(live_table(status(phase="paused", step=0), [a_round(1)]))
    assert "training" not in text
    assert "12.3k" not in text, "it makes no tokens"
    assert row_of("cpp", status(phase="paused", doing="starting"), [a_round(1)])[1] == "starting"


def test_who_only_looks_once_is_told_no_time_so_far():
    assert "so far" not in shown(live_table(status(), [a_round(1)]))
    assert shown(live_table(status(), [a_round(1)])).splitlines()[0].endswith("round 3 of 9  about 6:30 left")
    assert "so far, about 6:30 left" in shown(live_table(status(), [a_round(1)], 0.0))


def test_the_live_table_before_anything_is_known():
    lines = shown(live_table(RunStatus("demo", "starting", 0, 9, silos={"a": SiloStatus("a")}), [], 0.0)).splitlines()
    assert "left" not in lines[0]
    assert lines[-1].split() == ["a", "waiting"]


def test_the_live_table_of_a_run_that_is_over_still_has_its_silos():
    now = RunStatus("demo", "finished", 9, 9)
    text = shown(live_table(now, [a_round(n) for n in range(1, 10)] + [final()], 0.0))
    assert "9 of 9 rounds" in text
    assert "left" not in text
    assert "docs" in text


def test_a_silo_that_rested_keeps_its_last_figures():
    records = [a_round(1), a_round(2, ("cpp",))]
    (docs,) = (line for line in shown(live_table(status(), records, 0.0)).splitlines() if line.startswith("docs"))
    assert docs.split()[3:] == ["3.456", "2.143", "12.3k", "0.12", "6.00", "MB"]


# The time left.


def test_time_left_is_of_the_rounds_that_are_not_done():
    rounds = [a_round(1), a_round(2)]
    assert seconds_left(status(step=0), rounds) == 7 * 60
    assert seconds_left(status(step=50), rounds) == 6.5 * 60
    assert seconds_left(status(step=0, doing="saving"), rounds) == 6 * 60, "a silo that has trained is done"
    assert seconds_left(status(step=0, doing="scoring"), rounds) == 7 * 60


def test_time_left_is_not_moved_by_one_slow_round():
    rounds = [a_round(n, seconds=s) for n, s in enumerate((60, 60, 3600, 60, 60), 1)]
    assert seconds_left(status(step=0), rounds) == 7 * 60


def test_silos_of_an_older_round_say_nothing_of_this_one():
    now = status(round=2, step=0)
    old = {name: SiloStatus(name, "waiting", 1, 0, 100) for name in FOUR}
    assert seconds_left(RunStatus(now.run, "training", 2, 9, silos=old), [a_round(1)]) == 7 * 60


def test_there_is_no_time_left_to_tell_without_a_round_or_at_the_end():
    assert seconds_left(status(), []) is None
    assert seconds_left(status(round=9), [a_round(9)]) is None
    assert seconds_left(status(phase="stopped"), [a_round(2)]) is None


# Watching.


def watched(terminal: bool) -> str:
    told = [status(hardware=dict.fromkeys(FOUR, "cpu, 1 thread, fp32")), RunStatus("demo", "finished", 2, 2)]
    records = [a_round(1), a_round(2), final(round=2)]
    moments = iter([(told[0], records[:1]), (told[1], records)])
    now: list[Any] = []

    def ask() -> RunStatus:
        now[:] = next(moments)
        return now[0]

    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, record=True)
    last, seen = watch(console, ask, lambda since: now[1][since:], every_s=0)
    assert (last, seen) == (told[1], records)
    return console.export_text()


def test_a_pipe_gets_each_record_once():
    lines = watched(terminal=False).splitlines()
    assert [line.split()[0] for line in lines] == ["4", "before", "round", "before", "round", "final"]


def test_a_pipe_is_told_once_what_each_silo_runs_on_and_those_that_open_one_by_one_together():
    cpu, gpu = dict.fromkeys(FOUR, "cpu"), {**dict.fromkeys(FOUR, "cpu"), "urdu": "cuda"}
    opening = status(("python",), round=-1, doing="waiting", hardware={"python": "cpu"})
    moments = iter([
        (opening, []), (status(hardware=cpu), []), (status(hardware=cpu), [a_round(1)]),
        (status(hardware=gpu), [a_round(1)]), (status(hardware=gpu, phase="finished"), [a_round(1), a_round(2)]),
    ])  # fmt: skip
    now: list[Any] = []

    def ask() -> RunStatus:
        now[:] = next(moments)
        return now[0]

    console = Console(file=io.StringIO(), width=80, record=True)
    watch(console, ask, lambda since: now[1][since:], every_s=0)
    lines = [line for line in console.export_text().splitlines() if not line.startswith("before")]
    assert [lines[0], lines[2]] == ["4 silos       cpu: cpp, docs, maths, python", "1 silo        cuda: urdu"]
    assert [line.split()[:2] for line in lines[1::2]] == [["round", "1"], ["round", "2"]]


def test_a_terminal_gets_the_live_table():
    assert "2 of 2 rounds" in watched(terminal=True)


def test_waiting_ends_where_the_run_is_held_and_tells_what_is_new():
    records = [a_round(1), a_round(2), a_round(3)]
    moments = iter([status(round=2), status(round=3), status(round=3, phase="paused")])
    console = Console(file=io.StringIO(), width=80, record=True)
    last, seen = watch(console, lambda: next(moments), lambda since: records[since:], every_s=0, since=2, held=True)
    assert (last.phase, seen) == ("paused", records)
    assert [line.split()[:2] for line in console.export_text().splitlines()][-1] == ["round", "3"]
    assert "round    2" not in console.export_text()


# Final tables.


@pytest.mark.parametrize("sources", [FOUR, TEN, PILE])
def test_the_score_table_fits_80_columns(sources):
    text = shown(score_table(final(sources), "demo after 9 rounds"))
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [sources[0], "2.0000", "7.4", "2.0000", "2.5000", "-0.8000", "1.23M"] in lines
    assert len(lines) == 1 + 3 + len(sources) + 1 + 2, "title, header, sources, blank, means: nothing wraps"


def test_text_that_is_held_out_is_marked_and_has_a_mean_of_its_own():
    record = final(("de", "en", "irc"))
    record["scores"]["irc"]["held_out"] = True
    record["mean_held_out"] = {**record["mean"], "bits_per_byte": 9.5}
    lines = shown(score_table(record, "title")).splitlines()
    assert [line[:20].strip() for line in lines if "irc" in line or "held" in line] == [
        "irc (held out)",
        "mean of held out",
    ]
    assert "9.5000" in lines[-1]
    assert "irc* 2.286" in round_line(record).plain


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_s_tables_fit_80_columns(method, tmp_path):
    job = demo_job(method, str(tmp_path))
    records = [a_round(n) for n in range(1, 10)]
    if not METHODS[method].share_body:
        records = [{**record, "sent_bytes": {"down": 0, "up": 0}} for record in records]
    before, after = shown(introduction(job)), shown(summary(job, [*records, final()]))
    text = before + after
    assert "…" not in text
    assert len(before.splitlines()) == 9, "no line wraps"
    assert len(after.splitlines()) == 1 + 9 + 1 + 6, "no line wraps"
    assert ("stays home" in text) == (not METHODS[method].share_body)
    assert "times less" in text or "stays home" in text


def test_the_demo_tells_when_it_was_stopped_early(tmp_path):
    assert "stopped before its last round" in shown(summary(demo_job(None, str(tmp_path)), [a_round(1)]))
    assert "stopped before its last round" in shown(summary(demo_job(None, str(tmp_path)), []))


def test_a_round_tells_how_much_of_its_gpus_it_used_where_that_is_known():
    record = a_round(7, TEN)
    assert "MFU" not in round_line(record).plain
    for silo, peak in zip(record["silos"].values(), (1e15, 5e14, *[0.0] * 8), strict=False):
        silo |= {"flops": 2.5e15, "peak_flops": peak, "seconds": {"train": 10.0}}  # a quarter, a half, nobody knows
    assert round_line(record).plain.endswith("   38% MFU")
    assert f"while they trained: {len(record['silos']) * 250} TFLOP/s, 38% MFU" in shown(ledger_table(record))


def test_the_ledger_of_a_round_says_who_did_what_and_why_another_did_not():
    record = a_round(7, TEN, refused={"urdu": "body: not finite"}, away={"greek": "dropped"})
    record["failed"] = [{"attempt": 0, "refused": {"hindi": "no answer"}}]
    for silo in record["silos"].values():
        silo |= {"norm": 12.345, "cosine": -0.271, "seconds": {"train": 3599.4, "send": 12.3, "wait": 0.04}}
    record["silos"]["hindi"]["lost"] = "ActorDied"
    text = shown(ledger_table(record))
    assert max(map(len, text.splitlines())) <= 80
    (line,) = (line for line in text.splitlines() if line.startswith("indonesian"))
    figures = ["100", "3.210", "12.35", "-0.27", "3.00M", "3.00M", "3599.4", "12.3", "0.0"]
    assert line.split() == ["indonesian", *figures]
    for told in (
        "hindi made anew, 100 steps since: ActorDied",
        "urdu left out: body: not finite", "hindi left out of attempt 1: no answer", "greek away: dropped",
    ):  # fmt: skip
        assert told in text
    stayed_home = {**record["silos"]["urdu"], "norm": 0.0, "cosine": None}
    assert "urdu" in shown(ledger_table({**record, "silos": {"urdu": stayed_home}}))
