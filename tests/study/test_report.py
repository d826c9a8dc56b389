"""The report shows what is on record, all of it, and needs nothing but itself."""

import copy
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dept_ray.cli import main
from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError
from dept_ray.in_process import train_here
from dept_ray.jobfile import parse_job
from dept_ray.reporting import write_report
from dept_ray.rounds.control import Control
from dept_ray.rounds.methods import METHODS
from dept_ray.study.report import plot_of, report_on
from dept_ray.study.story import Story

SOURCES = ("de", "fr", "it")


def a_job(**more: Any) -> Job:
    sources = [{"name": name, "kind": "files", "paths": f"text/{name}.txt"} for name in SOURCES]
    values = {"name": "told", "method": "trim", "sources": sources, "inner": {"local_steps": 10, "context": 64},
              "model": {"layers": 1, "width": 32, "heads": 2}, "tokenizer": {"vocab_size": 300}} | more  # fmt: skip
    return parse_job(values)


def a_round(number: int, silos: tuple[str, ...] = SOURCES, **more: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "event": "round", "run": "told", "round": number, "attempt": 0, "time": "2026-01-02T03:04:05+0000",
        "seconds": 10.0, "step": 10 * number, "tokens": 1000 * number, "loss": 5.0 - number,
        "sent_bytes": {"down": 1000, "up": 500}, "refused": {}, "away": {},
        "silos": {
            name: {
                "tokens": 300, "steps": 10, "loss": 5.0 - number, "norm": 1.0, "cosine": 0.5, "down_bytes": 300,
                "up_bytes": 200, "epochs": {name: 0.1}, "seconds": {"train": 8.0, "wait": 1.0, "send": 0.5},
            }
            for name in silos
        },
    }  # fmt: skip
    return record | scores(silos, 8.0 - number) | more


def scores(sources: tuple[str, ...], bits: float, text_bytes: int = 1000) -> dict[str, Any]:
    one = {"loss": bits, "perplexity": 9.0, "bits_per_byte": bits, "unigram_bits_per_byte": 4.0, "normalised": -1.0,
           "tokens": 100, "text_bytes": text_bytes}  # fmt: skip
    mean = {"bits_per_byte": bits, "perplexity": 9.0, "pooled_bits_per_byte": bits, "pooled_loss": bits}
    return {"scores": {source: dict(one) for source in sources}, "mean": mean}


def final(number: int, bits: float, sources: tuple[str, ...] = SOURCES, text_bytes: int = 1000) -> dict[str, Any]:
    about = {"event": "scores", "run": "told", "round": number, "time": "2026-01-02T04:04:05+0000", "refused": {}}
    return about | scores(sources, bits, text_bytes)


def change(number: int, what: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"event": "change", "run": "told", "round": number, "time": "2026-01-02T03:04:05", "change": what, **more}


def a_story(*records: dict[str, Any], name: str = "told", **job: Any) -> Story:
    return Story(name, a_job(**job), records, "finished")


class Seen(HTMLParser):
    """What a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            f"{key}={value}" for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")
        ]
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def rows(page: str) -> list[list[str]]:
    """Every table's rows as text."""
    found = re.findall(r"<tr>(.*?)</tr>", page)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in found]


# The story.


def test_what_is_held_out_is_worth_something_and_counts_in_no_mean():
    closing = final(1, 3.0)
    closing["scores"]["de"] |= {"held_out": True, "bits_per_byte": 9.0}
    story = a_story(a_round(1), closing)
    worth = story.worth()
    assert (worth["de"].counts, worth["de"].why_not) == (False, "held out")
    assert story.mean_worth() == 3.0
    assert ("de", "1, held out") in [(row[0], row[-1]) for row in rows(report_on([story]))]


def test_scores_are_of_the_round_before_their_record():
    story = a_story(a_round(1), a_round(2), final(2, 3.0))
    assert story.bits()["de"] == [(0, 7.0), (1, 6.0), (2, 3.0)]
    assert story.mean_bits() == [(0, 7.0), (1, 6.0), (2, 3.0)]


def test_no_line_is_drawn_where_a_silo_was_away():
    gone = a_round(2, ("de", "it"), away={"fr": "dropped"})
    story = a_story(a_round(1), gone, a_round(3))
    (one, (at, nothing), three) = story.of_silos("loss")["fr"]
    assert (one, at, three) == ((1, 4.0), 2, (3, 2.0))
    assert nothing != nothing
    assert [x for x, _ in story.of_silos("loss")["de"]] == [1, 2, 3]


def test_data_parallel_training_is_counted_by_the_steps_that_were_made():
    from dept_ray.study.plan import plan

    story = a_story(a_round(1), a_round(2, ("de",)))
    parallel = plan(story.job).data_parallel
    assert parallel is not None
    assert story.data_parallel_bytes() == [(1, 30 * parallel.step_bytes), (2, 40 * parallel.step_bytes)]


def test_without_a_global_vocabulary_there_is_nothing_to_compare_with():
    story = a_story(a_round(1), method="spec-opt")
    assert story.data_parallel_bytes() is None
    assert "tokenizer.global_vocab_size" in report_on([story])


def test_a_source_that_left_keeps_its_worth_and_is_not_in_the_mean():
    story = a_story(a_round(1), a_round(2, ("de", "it"), away={"fr": "dropped"}), final(2, 3.0, ("de", "it")))
    assert story.worth()["fr"].round == 0
    assert not story.worth()["fr"].counts
    assert story.mean_worth() == 3.0


def test_comings_and_goings_are_told_in_order_with_their_reasons():
    added = {"add": {"name": "sw", "kind": "files", "paths": ["sw.txt"]}}
    story = a_story(
        a_round(1), change(1, {"drop": "fr"}), a_round(2, ("de", "it"), away={"fr": "dropped"}), change(2, added),
        a_round(3, ("de", "it", "sw"), away={"fr": "dropped"}, refused={"de": "body: not finite"}),
        change(3, {"return": "fr"}), change(3, {"set": "outer.lr", "to": 0.5}),
        change(3, {"drop": "it"}, refused="last"),
        a_round(4, away={"sw": "lost its node"}, failed=[{"attempt": 0, "refused": {"de": "no answer"}}]),
    )  # fmt: skip
    assert [(e.round, e.who, e.what, e.why) for e in story.events()] == [
        (1, "fr", "dropped", "people asked"),
        (2, "sw", "joins", "people asked"),
        (3, "de", "answer refused or lost", "body: not finite"),
        (3, "sw", "trains for the first time", ""),
        (3, "fr", "returns", "people asked"),
        (3, "", "outer.lr = 0.5", "people asked"),
        (3, "it", "dropped", "people asked; refused: last"),
        (4, "de", "lost in attempt 1", "no answer"),
        (4, "sw", "away", "lost its node"),
        (4, "fr", "trains again", ""),
    ]
    assert story.job.outer.lr == 0.5
    assert [source.name for source in story.job.sources] == [*SOURCES, "sw"]


# The page.


def test_every_source_reason_and_figure_is_on_the_page():
    story = a_story(a_round(1, refused={"fr": "body: norm 9 is over 3 times"}, away={"xx": "could not be made"}),
                    final(1, 2.3456))  # fmt: skip
    page = report_on([story])
    seen = Seen(page).text
    for word in (
        *SOURCES,
        "body: norm 9 is over 3 times",
        "could not be made",
        "2.3456",
        "TRIM",
        "1.50 kB",
        "layers 1",
    ):
        assert word in seen, word
    titles = " ".join(title.text or "" for svg in svgs(page) for title in svg.iter("{http://www.w3.org/2000/svg}title"))
    assert "round 1: body: norm 9 is over 3 times" in titles, "and where the pointer is"


def test_the_page_asks_nothing_of_anybody():
    seen = Seen(report_on([a_story(a_round(1), final(1, 2.0)), a_story(a_round(1), name="other")]))
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(seen.tags)
    assert seen.links, "frames that several drawings share"
    assert all(link.startswith("href=#frame-") for link in seen.links), "and which are on the page itself"
    page = report_on([a_story(a_round(1))])
    assert "url(" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"'<\s]+", page)) == {"http://www.w3.org/2000/svg"}, (
        "a name, which nobody fetches"
    )


def test_what_a_run_says_is_never_markup():
    bad = '<img src=x onerror="alert(1)">&\x1b'
    records = [a_round(1, ("de", bad), refused={"fr": bad}, away={bad + "2": bad},
                       failed=[{"attempt": 0, "refused": {bad: bad}}]),
               change(1, {"set": "outer.lr", "to": bad}, refused=bad), final(1, 2.0, ("de", bad))]  # fmt: skip
    story = Story(bad, a_job(), tuple(records), bad, bad)
    page = report_on([story, Story("b", a_job(), tuple(records))])
    seen = Seen(page)
    assert "img" not in seen.tags
    assert '<img src=x onerror="alert(1)">' in seen.text
    assert svgs(page)


def test_every_drawing_is_valid_xml():
    page = report_on([a_story(*(a_round(n) for n in range(1, 6)), final(5, 2.0))])
    assert len(svgs(page)) == 7


@pytest.mark.parametrize("records", [(), (a_round(1),), (final(0, 2.0),), (change(0, {"set": "outer.lr", "to": 1}),)])
def test_a_run_that_has_hardly_begun_has_a_page(records: tuple[dict[str, Any], ...]):
    page = report_on([a_story(*records)])
    assert svgs(page)
    assert "0 of 10 rounds committed" in page or "1 of 10 rounds committed" in page


def test_figures_that_are_not_there_leave_a_gap():
    record = a_round(1)
    record["scores"]["de"]["bits_per_byte"] = None
    record["mean"]["bits_per_byte"] = None
    record["silos"]["fr"]["cosine"] = None
    del record["silos"]["it"]["seconds"]
    assert svgs(report_on([a_story(record, a_round(2))]))


def test_the_best_of_several_runs_is_marked_and_ties_are_shared():
    one = a_story(a_round(1), final(1, 2.0), name="one")
    two = a_story(a_round(1), final(1, 3.0), name="two")
    two.records[-1]["scores"]["de"]["bits_per_byte"] = 1.5
    two.records[-1]["scores"]["fr"]["bits_per_byte"] = 2.0
    table = rows(report_on([one, two]))
    at = table.index(["source", "one", "two"])
    assert table[at + 1 : at + 5] == [
        ["de", "2.0000", "★ 1.5000"],
        ["fr", "★ 2.0000", "★ 2.0000"],
        ["it", "★ 2.0000", "3.0000"],
        ["mean", "★ 2.0000", "2.1667"],
    ]


def test_runs_that_cannot_be_compared_are_said_not_to_be():
    one = a_story(a_round(1), final(1, 2.0), name="one")
    other_text = a_story(a_round(1), final(1, 2.0, text_bytes=999), name="two")
    fewer = a_story(a_round(1), final(1, 2.0, ("de",)), name="two")
    fewer = Story("two", fewer.first, ({**final(1, 2.0, ("de",))},))
    assert "held-out text of de, fr, it differs" in report_on([one, other_text])
    assert "means are not comparable" in report_on([one, fewer])
    fair = report_on([one, a_story(a_round(1), final(1, 2.5), name="two")])
    assert "omparable" not in fair


def test_several_runs_share_their_axes():
    short = a_story(a_round(1), name="short")
    long = a_story(*(a_round(n) for n in range(1, 5)), name="long")
    drawn = {svg.attrib["aria-label"]: svg for svg in svgs(report_on([short, long]))}

    def frame(title: str) -> tuple[str | None, list[str]]:
        """Which one, and its ticks where it is written."""
        svg = "{http://www.w3.org/2000/svg}"
        shown = next(e for e in drawn[title] if e.tag in (f"{svg}g", f"{svg}use"))
        return shown.get("id") or shown.get("href", "").removeprefix("#"), [
            t.text or "" for t in shown.iter(f"{svg}text")
        ]

    for title in ("Training loss", "Bits per byte", "How far each silo moved the body", "All bytes, down and up"):
        (one, ticks), (other, nothing) = frame(f"{title}: short"), frame(f"{title}: long")
        assert one == other
        assert len(ticks) > 5
        assert not nothing


def test_what_all_names_begin_with_is_said_once():
    page = report_on([a_story(a_round(1), name=f"study.{name}") for name in ("std.s0", "glob.s0")])
    assert ["source", "std.s0", "glob.s0"] in rows(page)
    assert "2 runs of study side by side" in page
    assert "study." not in page


def test_many_runs_take_less_room_than_as_many_pages():
    runs = [a_story(*(a_round(n) for n in range(1, 5)), final(4, 2.0), name=f"run-{number}") for number in range(8)]
    assert len(report_on(runs)) < 0.7 * sum(len(report_on([run])) for run in runs)


def test_what_differs_between_runs_is_listed():
    page = report_on([a_story(a_round(1), name="one"), a_story(a_round(1), name="two", seed=7, method="glob")])
    table = rows(page)
    at = table.index(["setting", "one", "two"])
    assert [row[0] for row in table[at + 1 : at + 3]] == ["method", "seed"]


def test_telling_changes_nothing():
    records = [a_round(1, refused={"fr": "x"}), change(1, {"drop": "fr"}), a_round(2, ("de",), away={"fr": "dropped"})]
    before = copy.deepcopy(records)
    report_on([a_story(*records)])
    assert records == before


def test_a_notebook_gets_the_charts_alone():
    html = plot_of([a_story(a_round(1), final(1, 2.0))])._repr_html_()
    assert "<html" not in html
    assert "<style>" in html
    assert len(svgs(html)) == 7
    style = html.partition("</style>")[0].removeprefix("<style>")
    selectors = [one.strip() for several in re.findall(r"([^{}]+){", style) for one in several.split(",")]
    assert all(selector.startswith((".dept-", "@media")) for selector in selectors), "nothing else is touched"


# From real runs.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page(tiny: Callable[..., Job], method: str):
    job = tiny(method, rounds={"total": 2})
    train_here(job, lambda record: None)
    file = write_report([Path(job.folder) / "runs" / job.name])
    page = file.read_text()
    assert file.parent.name == job.name
    assert all(source.name in page for source in job.sources)
    assert svgs(page)
    assert ("nothing was sent" in page) == (not METHODS[method].share_body)


def test_a_run_that_someone_left_and_joined_is_told_as_it_was(tiny: Callable[..., Job], tmp_path: Path):
    (tmp_path / "new.txt").write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(40)))
    (tmp_path / "old.txt").write_text("".join(f"{a} minus {b} is {a - b}\n" for a in range(20) for b in range(9)))
    texts = {"paths": [str(tmp_path / "new.txt")], "validation_paths": [str(tmp_path / "old.txt")]}
    control = Control()

    def meddle(record: dict[str, Any]) -> None:
        if record["event"] == "round" and record["round"] == 1:
            control.change({"drop": "code"}, "a")
            control.change({"add": {"name": "sums", "kind": "files", **texts}}, "b")

    job = tiny("spec-opt", rounds={"total": 3})
    train_here(job, meddle, control=control)
    run = Run.open(Path(job.folder) / "runs" / job.name)
    seen = Seen(report_on([run.story()])).text
    for words in ("dropped", "joins", "sums", "trains for the first time"):
        assert words in seen


# The command.


def test_the_command_prints_where_the_page_is(tiny: Callable[..., Job], tmp_path: Path):
    job = tiny("glob", rounds={"total": 1})
    train_here(job, lambda record: None)
    folder = Path(job.folder) / "runs" / job.name
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(folder), "--out", str(out)])
    assert done.output.strip() == str(out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(StoreError, match=r"nowhere/page\.html cannot be written .* name another file with --out"):
        write_report([folder], tmp_path / "nowhere" / "page.html")


def test_a_run_that_is_missing_is_named(tmp_path: Path):
    done = CliRunner().invoke(main, ["report", str(tmp_path / "no-such-run")])
    assert done.exit_code == 1
    assert f'no run "{tmp_path / "no-such-run"}"' in done.output
    with pytest.raises(ConfigError, match="neither a run folder nor a name under runs/"):
        write_report(["no-such-run"])
