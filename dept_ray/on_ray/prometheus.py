"""What a run tells Prometheus, through the metrics agent of each Ray node: a sink of records, and a silo's own gauges.

Ray exports them with the prefix `ray_`, counters with the suffix `_total`, on each node's metrics port; the points that
Prometheus scrapes stand in Ray's own `prom_metrics_service_discovery.json`. `clusters/grafana.json` draws them.
They are a view: nothing is read back from here, and a coordinator that was restarted counts from 0 again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dept_ray.messages import SiloStatus
from dept_ray.metrics import Record


@dataclass(frozen=True)
class Measure:
    """One metric."""

    name: str
    kind: Literal["gauge", "counter"]
    words: str
    tags: tuple[str, ...] = ("run",)

    @property
    def exported(self) -> str:
        """Its name where Prometheus scrapes it."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


SILO = ("run", "silo")
OF_ROUNDS = (
    Measure("dept_round", "gauge", "Rounds committed."),
    Measure("dept_loss", "gauge", "Mean training loss of the last round, nats per token."),
    Measure("dept_tokens_per_second", "gauge", "Trained by all silos in the last round, by its wall time."),
    Measure("dept_round_seconds", "gauge", "Wall time of the last round, failed attempts included."),
    Measure("dept_silos_alive", "gauge", "Silos with a living process at the end of the last round."),
    Measure("dept_silos_away", "gauge", "Silos that take no part: dropped, set aside, or never made."),
    Measure("dept_bits_per_byte", "gauge", "Of held-out text, when it was last measured.", ("run", "source")),
    Measure("dept_tokens", "counter", "Trained, all silos."),
    Measure("dept_bytes", "counter", "Sent, failed attempts included; way: down or up.", ("run", "way")),
    Measure("dept_silo_loss", "gauge", "Mean training loss of the last round, nats per token.", SILO),
    Measure("dept_silo_tokens_per_second", "gauge", "Of the last round, while it trained.", SILO),
    Measure("dept_silo_seconds", "gauge", "Of the last round; doing: train, wait, send, ...", (*SILO, "doing")),
    Measure("dept_silo_norm", "gauge", "L2 norm of the body's delta in the last round.", SILO),
    Measure("dept_silo_cosine", "gauge", "Of the body's delta to the mean, in the last round.", SILO),
    Measure("dept_silo_bytes", "counter", "Sent with answers that counted; way: down or up.", (*SILO, "way")),
    Measure("dept_silo_refused", "counter", "Answers that were lost or did not count.", SILO),
)
"""Set by the coordinator when a round is committed."""
OF_NOW = (
    Measure("dept_now_step", "gauge", "Inner steps made in the round in progress.", SILO),
    Measure("dept_now_loss", "gauge", "Latest training loss that was read, nats per token.", SILO),
    Measure("dept_now_tokens_per_second", "gauge", "While it trains; 0 while it does not.", SILO),
)
"""Set by each silo on its own node while it trains."""

Reading = tuple[str, float, dict[str, str]]
"""(name, value or increment, tags)."""


class PrometheusSink:
    """A sink of records that tells Prometheus.

    Args:
        alive: how many silos are.
    """

    def __init__(self, alive: Callable[[], int]) -> None:
        self._alive, self._metrics = alive, _Metrics(OF_ROUNDS)

    def __call__(self, record: Record) -> None:
        for reading in readings(record):
            self._metrics.tell(reading)
        if record["event"] == "round":
            self._metrics.tell(("dept_silos_alive", self._alive(), {"run": record["run"]}))


class SiloGauges:
    """What one silo does now.

    Args:
        run, silo: their names.
    """

    def __init__(self, run: str, silo: str) -> None:
        self._tags, self._metrics = {"run": run, "silo": silo}, _Metrics(OF_NOW)

    def __call__(self, status: SiloStatus) -> None:
        self._metrics.tell(("dept_now_step", status.step, self._tags))
        self._metrics.tell(("dept_now_tokens_per_second", status.tokens_per_s if status.trains else 0.0, self._tags))
        self._metrics.tell(("dept_now_loss", status.loss, self._tags))


def readings(record: Record) -> Iterator[Reading]:
    """What a record says, by metric."""
    run = {"run": record["run"]}
    for source, score in record.get("scores", {}).items():
        yield "dept_bits_per_byte", score["bits_per_byte"], {**run, "source": source}
    if record["event"] != "round":
        return
    silos = record["silos"]
    tokens = sum(silo["tokens"] for silo in silos.values())
    yield "dept_round", record["round"], run
    yield "dept_loss", record["loss"], run
    yield "dept_tokens_per_second", tokens / max(record["seconds"], 1e-9), run
    yield "dept_round_seconds", record["seconds"], run
    yield "dept_silos_away", len(record["away"]), run
    yield "dept_tokens", tokens, run
    for way, sent in record["sent_bytes"].items():
        yield "dept_bytes", sent, {**run, "way": way}
    for name, silo in silos.items():
        yield from _of_silo(silo, {**run, "silo": name})
    for refused in (record["refused"], *(attempt["refused"] for attempt in record.get("failed", []))):
        for name in refused:
            yield "dept_silo_refused", 1, {**run, "silo": name}


def _of_silo(silo: dict[str, Any], tags: dict[str, str]) -> Iterator[Reading]:
    yield "dept_silo_loss", silo["loss"], tags
    if train := sum(silo["seconds"].get(what, 0.0) for what in ("train", "ahead")):
        yield "dept_silo_tokens_per_second", silo["tokens"] / train, tags
    for doing, seconds in silo["seconds"].items():
        yield "dept_silo_seconds", seconds, {**tags, "doing": doing}
    yield "dept_silo_norm", silo["norm"], tags
    if silo["cosine"] is not None:  # where bodies stay home there is no mean
        yield "dept_silo_cosine", silo["cosine"], tags
    for way in ("down", "up"):
        yield "dept_silo_bytes", silo[f"{way}_bytes"], {**tags, "way": way}


class _Metrics:
    """Ray's objects for some measures."""

    def __init__(self, measures: tuple[Measure, ...]) -> None:
        from ray.util.metrics import Counter, Gauge

        self._gauges = {m.name: Gauge(m.name, m.words, m.tags) for m in measures if m.kind == "gauge"}
        self._counters = {m.name: Counter(m.name, m.words, m.tags) for m in measures if m.kind == "counter"}

    def tell(self, reading: Reading) -> None:
        """One value; what is not finite is not told."""
        name, value, tags = reading
        if not math.isfinite(value):
            return
        if name in self._gauges:
            self._gauges[name].set(float(value), tags)
        elif value > 0:  # which Ray insists on
            self._counters[name].inc(float(value), tags)
