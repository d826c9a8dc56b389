"""Charts say what they were given: points at the right places, text that cannot break out, XML that parses."""

import doctest
import itertools
import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from dept_ray.study import axes, charts, timeline
from dept_ray.study.axes import Axis, axis_over
from dept_ray.study.charts import WIDTH, Bar, Line, bar_chart, line_chart, spread
from dept_ray.study.timeline import timeline_chart, timeline_of

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(svg).iter(f"{SVG}text")]


def tips(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter(f"{SVG}title")]


@pytest.mark.parametrize("module", [axes, charts])
def test_the_examples_in_docstrings_hold(module: Any):
    assert doctest.testmod(module).failed == 0


# Axes.


@pytest.mark.parametrize(
    "values", [[], [0.0], [3.2], [-1, -1], [1e-9, 2e-9], [0.9, 7.3], [1, 5000], [math.nan, 2.0], [-3, 12]]
)
@pytest.mark.parametrize("how", [{}, {"zero": True}, {"whole": True}, {"snug": True}, {"log": True}])
def test_an_axis_holds_all_its_values_and_has_ticks(values: list[float], how: dict[str, bool]):
    axis = axis_over("x", values, **how)
    assert axis.low < axis.high
    for value in values:
        if math.isfinite(value) and (value > 0 or not axis.log):
            assert axis.low <= value * (1 + 1e-9) or value <= 0
            assert value <= axis.high * (1 + 1e-9) or value <= 0
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert len({axis.told(tick) for tick in ticks}) == len(ticks), "no two ticks are told alike"


def test_rounds_are_counted_in_whole_numbers():
    assert axis_over("round", [1, 2, 3], whole=True, snug=True).ticks() == [1, 2, 3]
    assert axis_over("round", [1], whole=True, snug=True).ticks() == [1, 2]


def test_time_is_counted_as_people_do():
    axis = axis_over("time", [0, 3600], snug=True, unit="s")
    assert [axis.told(tick) for tick in axis.ticks()][:3] == ["0:00", "10:00", "20:00"]


# Lines.


X, Y = Axis("round", 0, 10, 2), Axis("loss", 0, 4, 1)


def paths(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The corners of each path of a kind."""
    found = [element.attrib["d"] for element in parsed(svg).iter(f"{SVG}path") if element.get("class") == kind]
    return [[tuple(map(float, pair.split())) for pair in d.removeprefix("M").split("L")] for d in found]  # type: ignore[misc]


def dots(svg: str) -> list[tuple[float, ...]]:
    """Where a line's points are marked."""
    found = [element.attrib["d"] for element in parsed(svg).iter(f"{SVG}path") if element.get("class") == "dots"]
    return [tuple(map(float, dot.removesuffix("h0").split())) for d in found for dot in d.split("M")[1:]]


def test_points_are_where_the_axes_say():
    svg = line_chart("Loss", [Line("de", ((0, 4.0), (5, 2.0), (10, 0.0)), 0)], X, Y)
    (line,) = paths(svg, "line")
    left, right, top, bottom = 74, WIDTH - 164, 30, 270 - 42
    assert line == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert dots(svg) == line
    assert "round 5\nde: 2" in tips(svg)


def test_a_tip_tells_all_lines_at_its_x_and_tips_are_not_too_many_to_hit():
    few = [Line("de", ((0, 4.0), (5, 2.0)), 0), Line("fr", ((5, 1.0), (10, math.nan)), 1)]
    assert tips(line_chart("Loss", few, X, Y)) == ["round 0\nde: 4", "round 5\nde: 2\nfr: 1"]
    many = Line("de", tuple((n, 1.0) for n in range(1000)), 0)
    told = tips(line_chart("Loss", [many], axis_over("round", [0, 999]), Y))
    assert 40 <= len(told) <= 80
    assert told[-1] == "round 999\nde: 1"


def test_a_line_is_broken_where_there_is_no_value():
    svg = line_chart("Loss", [Line("de", ((1, 3.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 0.5)), 0)], X, Y)
    assert [len(line) for line in paths(svg, "line")] == [2, 2]


def test_a_single_point_is_a_dot():
    svg = line_chart("Loss", [Line("de", ((1, 3.0),), 0)], axis_over("round", [1], whole=True), axis_over("y", [3.0]))
    assert len(dots(svg)) == 1
    assert paths(svg, "line") == []


@pytest.mark.parametrize("lines", [[], [Line("de", (), 0)], [Line("de", ((1, math.nan),), 0)]])
def test_nothing_is_said_to_be_nothing(lines: list[Line]):
    assert "nothing to show yet" in texts(line_chart("Loss", lines, X, Y))


def test_names_beside_lines_never_overlap():
    lines = [Line(f"source-{i}", ((0, 1.0), (10, 1.0 + i / 1000)), i) for i in range(30)]
    svg = line_chart("Loss", lines, X, Y)
    rows = sorted(float(e.attrib["y"]) for e in parsed(svg).iter(f"{SVG}text") if e.get("class") == "name")
    assert len(rows) == 30
    assert all(below - above >= 13.8 for above, below in itertools.pairwise(rows))
    height = float(parsed(svg).attrib["viewBox"].split()[3])
    assert rows[0] > 15
    assert rows[-1] < height


def test_spread_moves_nothing_that_has_room():
    assert spread([10.0, 40.0, 80.0], 14, 0, 100) == [10.0, 40.0, 80.0]


def test_past_the_colours_lines_are_dashed():
    svg = line_chart("Loss", [Line(f"s{i}", ((0, 1.0), (10, 2.0)), i) for i in range(20)], X, Y)
    kinds = [g.attrib["class"] for g in parsed(svg).iter(f"{SVG}g") if g.get("class", "").startswith("c")]
    assert len(set(kinds)) == 20


def test_whatever_is_said_cannot_break_out_of_the_drawing():
    name = "<script>alert(1)</script>\"'&\x00\x1b\ufffe"
    for svg in (
        line_chart(name, [Line(name, ((0, 1.0), (1, 2.0)), 0)], Axis(name, 0, 1, 1), Axis(name, 0, 4, 1)),
        bar_chart(name, [Bar(name, (1.0, 2.0), name)], (name, name), name, Y),
        timeline_chart(name, timeline_of([a_round(1, {name: {"train": 1.0, name: 2.0}}, refused={name + "b": name})])),
    ):
        assert "<script" not in svg
        assert any("<script>alert(1)</script>" in tip for tip in tips(svg))


# Bars.


def test_bars_are_as_high_as_they_are_worth_and_stand_on_each_other():
    svg = bar_chart("Bytes", [Bar("1", (1.0, 2.0), "one"), Bar("2", (0.0, 4.0), "two")], ("down", "up"), "round", Y)
    bars = [g for g in parsed(svg).iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    boxes = [rect.attrib for bar in bars for rect in bar.findall(f"{SVG}rect")]
    unit = (270 - 42 - 30) / 4
    assert [float(box["height"]) for box in boxes] == pytest.approx([unit, 2 * unit, 0, 4 * unit], abs=0.1)
    assert float(boxes[1]["y"]) + float(boxes[1]["height"]) == pytest.approx(float(boxes[0]["y"]), abs=0.11)
    assert tips(svg) == ["one", "two"]


@pytest.mark.parametrize("names", [[str(n) for n in range(1, 61)], [f"{n}-{n + 3}" for n in range(1, 240, 4)], ["1"]])
def test_labels_under_bars_never_overlap(names: list[str]):
    svg = bar_chart("Bytes", [Bar(name, (1.0,), "") for name in names], ("down",), "round", Y)
    (ticks,) = (g for g in parsed(svg).iter(f"{SVG}g") if g.get("text-anchor") == "middle" and len(g))
    labels = [e for e in ticks if e.text in names]
    ends = [(float(e.attrib["x"]), 3.5 * len(e.text or "")) for e in labels]
    assert ends
    assert all(x + half < next_x - next_half for (x, half), (next_x, next_half) in itertools.pairwise(ends))


def test_a_method_that_sends_nothing_says_so():
    assert "nothing was sent" in texts(bar_chart("Bytes", [Bar("1", (0.0, 0.0), "")], ("down", "up"), "round", Y))


# The timeline.


def a_round(number: int, silos: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    record = {
        "event": "round", "round": number, "seconds": 10.0, "refused": {}, "away": {},
        "silos": {name: {"seconds": seconds} for name, seconds in silos.items()},
    }  # fmt: skip
    return record | more


def test_a_cell_ends_with_its_round_and_keeps_the_order_of_work():
    found = timeline_of(
        [a_round(1, {"de": {"train": 4.0, "send": 2.0, "wait": 1.0, "load": 0.5, "save": 0.5, "score": 1.0}})]
    )
    (cell,) = found.cells
    assert cell.start == pytest.approx(1.0)
    assert cell.parts == (("send", 1.0), ("load", 1.0), ("score", 1.0), ("train", 4.0), ("send", 1.0), ("wait", 1.0))
    assert cell.start + sum(seconds for _, seconds in cell.parts) == pytest.approx(found.end)
    assert "training 4 s" in cell.tip


def test_rounds_follow_each_other_as_long_as_they_took():
    found = timeline_of([a_round(1, {"de": {"train": 9.0}}), a_round(2, {"de": {"train": 5.0}}, seconds=5.0)])
    assert found.columns == (("1", 0.0), ("2", 10.0))
    assert found.end == 15.0
    assert [cell.start for cell in found.cells] == [1.0, 10.0]


def test_a_lost_answer_takes_the_round_and_tells_why():
    found = timeline_of([a_round(1, {"de": {"train": 9.0}}, refused={"fr": "body: not finite"})])
    (cell,) = (cell for cell in found.cells if cell.silo == "fr")
    assert cell.parts == (("refused", 10.0),)
    svg = timeline_chart("Time", found)
    assert any("body: not finite" in tip for tip in tips(svg))
    assert "lost or refused" in texts(svg)


def test_a_failed_attempt_stands_before_the_one_that_counted():
    failed = [{"attempt": 0, "refused": {"de": "no answer"}}]
    found = timeline_of([a_round(1, {"de": {"train": 4.0}}, failed=failed)])
    lost, trained = sorted(found.cells, key=lambda cell: cell.start)
    assert (lost.start, lost.parts) == (0.0, (("refused", 6.0),))
    assert (trained.start, trained.parts) == (6.0, (("train", 4.0),))
    assert "attempt 1: no answer" in lost.tip


def test_a_lost_answer_shows_however_short_its_round():
    rounds = [a_round(1, {"de": {"train": 9000.0}}, seconds=9000.0), a_round(2, {}, refused={"de": "x"}, seconds=0.1)]
    svg = timeline_chart("Time", timeline_of(rounds))
    lost = [e.attrib["d"] for e in parsed(svg).iter(f"{SVG}path") if e.get("class") == "dept-refused"]
    assert [float(d.partition("h")[2]) for d in lost] == [12.0, 5.0], "of the legend, and of the round"


def test_who_is_away_is_shown_away_and_who_rests_is_not_shown():
    found = timeline_of([a_round(1, {"de": {"train": 9.0}}, away={"fr": "dropped"})])
    assert found.silos == ("de", "fr")
    assert [cell.parts for cell in found.cells if cell.silo == "fr"] == [(("away", 10.0),)]


def test_many_rounds_share_columns_and_lose_no_second_and_no_reason():
    rounds = [a_round(n, {"de": {"train": 6.0, "wait": 4.0}}, refused={"fr": "x"} if n == 77 else {}) for n in
              range(1, 201)]  # fmt: skip
    found = timeline_of(rounds, most=60)
    assert found.rounds_each == 4
    assert len(found.columns) == 50
    assert sum(s for cell in found.cells for state, s in cell.parts if state == "train") == pytest.approx(1200)
    assert any("round 77: x" in cell.tip for cell in found.cells)
    assert found.columns[1][0] == "5-8"


def test_a_run_that_has_not_begun_has_an_empty_timeline():
    assert "no round is committed yet" in texts(timeline_chart("Time", timeline_of([])))
    assert timeline.spoken(timeline_of([]))
