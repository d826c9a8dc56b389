"""What a run tells Prometheus: the record's figures by name, found again where Prometheus would scrape them."""

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nodes import until

from dept_ray.client import Run
from dept_ray.config import Job
from dept_ray.on_ray.prometheus import OF_NOW, OF_ROUNDS, readings

DASHBOARD = Path(__file__).parents[2] / "clusters" / "grafana.json"
EXPORTED = {measure.exported: measure for measure in (*OF_ROUNDS, *OF_NOW)}


def a_round(**more: Any) -> dict[str, Any]:
    silo = {"tokens": 100, "loss": 2.0, "norm": 1.5, "cosine": 0.5, "down_bytes": 30, "up_bytes": 20,
            "seconds": {"train": 4.0, "wait": 1.0, "send": 0.5}}  # fmt: skip
    return {
        "event": "round", "run": "r", "round": 3, "seconds": 10.0, "loss": 2.5, "sent_bytes": {"down": 70, "up": 40},
        "silos": {"de": silo, "fr": silo | {"cosine": None}}, "refused": {"it": "late"}, "away": {"sw": "dropped"},
        "failed": [{"attempt": 0, "refused": {"it": "dead", "de": "dead"}}],
        "scores": {"de": {"bits_per_byte": 1.25}},
    } | more  # fmt: skip


def told(record: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """By name and tag values; increments summed up."""
    found: dict[tuple[str, ...], float] = {}
    for name, value, tags in readings(record):
        key = (name, *tags.values())
        found[key] = found.get(key, 0.0) + value
    return found


def test_a_round_is_told_by_run_and_silo():
    found = told(a_round())
    assert found["dept_round", "r"] == 3
    assert found["dept_tokens_per_second", "r"] == 20.0
    assert found["dept_silo_tokens_per_second", "r", "de"] == 25.0
    assert found["dept_silo_seconds", "r", "de", "wait"] == 1.0
    assert found["dept_bytes", "r", "down"] == 70
    assert found["dept_silo_bytes", "r", "fr", "up"] == 20
    assert found["dept_silos_away", "r"] == 1
    assert found["dept_bits_per_byte", "r", "de"] == 1.25
    assert found["dept_silo_cosine", "r", "de"] == 0.5
    assert ("dept_silo_cosine", "r", "fr") not in found


def test_every_lost_answer_counts_those_of_failed_attempts_too():
    found = told(a_round())
    assert (found["dept_silo_refused", "r", "it"], found["dept_silo_refused", "r", "de"]) == (2, 1)


def test_all_that_is_told_is_a_known_measure_with_its_tags():
    known = {measure.name: measure.tags for measure in OF_ROUNDS}
    for name, _, tags in readings(a_round()):
        assert tuple(tags) == known[name]


def test_final_scores_and_changes_are_records_too():
    final = {"event": "scores", "run": "r", "round": 3, "scores": {"de": {"bits_per_byte": 1.0}}, "refused": {}}
    assert told(final) == {("dept_bits_per_byte", "r", "de"): 1.0}
    assert told({"event": "change", "run": "r", "round": 3, "change": {"drop": "de"}}) == {}


# The dashboard.


def expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    variables = [variable["query"] for variable in board["templating"]["list"]]
    asked = [query["query"] for query in variables if isinstance(query, dict)]
    return asked + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_is_on_it():
    drawn = {name for expression in expressions() for name in re.findall(r"\bray_\w+|\bdept_\w+", expression)}
    assert drawn == set(EXPORTED)


def test_the_dashboard_asks_only_for_tags_that_its_metrics_have():
    for expression in expressions():
        for name, labels in re.findall(r"(ray_dept_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", labels)) <= set(EXPORTED[name].tags), expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            (name,) = re.findall(r"ray_dept_\w+", expression)
            assert set(re.split(r",\s*", grouped)) <= set(EXPORTED[name].tags), expression


def test_panels_of_the_dashboard_do_not_lie_on_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


# On Ray.


@pytest.mark.ray
def test_a_run_is_found_where_prometheus_scrapes(tiny: Callable[..., Job], ray_here: None) -> None:
    import ray

    run = Run.start(tiny("spec", name="scraped", inner={"local_steps": 400}, rounds={"total": 60}))
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    # Nobody was refused, and a counter that never counted is not told.
    wanted = EXPORTED.keys() - {"ray_dept_silo_refused_total"}
    seen: dict[str, dict[tuple[str, ...], float]] = {}

    def scraped() -> bool:
        with urllib.request.urlopen(url, timeout=10) as page:
            for line in page.read().decode().splitlines():
                if (found := re.match(r"(ray_dept_\w+)\{(.*)\} (\S+)$", line)) and 'run="scraped"' in line:
                    tags = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
                    key = tuple(tags[tag] for tag in EXPORTED[found[1]].tags) if found[1] in EXPORTED else ()
                    seen.setdefault(found[1], {})[key] = float(found[3])
        of_silos = (seen.get(name, {}) for name in ("ray_dept_silo_loss", "ray_dept_now_step"))
        all_silos = all(len({key[1] for key in told}) == 3 for told in of_silos)  # they are not told at one moment
        return (wanted <= seen.keys() and all_silos) or run.status().over

    try:
        until(scraped, 240)
    finally:
        run.kill()
    assert seen.keys() == wanted
    assert {key[1] for key in seen["ray_dept_silo_loss"]} == {"code", "latin", "numbers"}
    assert {key[1] for key in seen["ray_dept_now_step"]} == {"code", "latin", "numbers"}
    assert seen["ray_dept_silos_alive"] == {("scraped",): 3}
    records = {record["round"]: record for record in run.history() if record["event"] == "round"}
    assert seen["ray_dept_loss"]["scraped",] in {record["loss"] for record in records.values()}
    assert seen["ray_dept_bytes_total"]["scraped", "up"] % records[1]["sent_bytes"]["up"] == 0
