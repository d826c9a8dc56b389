"""The record of a round: who did what, at which cost, and what came of it. Plain values, one JSON object.

A record of event "round" has

    run, round (1 is the first), attempt, time (ISO 8601), seconds
    step        global inner steps so far            tokens      trained so far, all silos
    loss        mean training loss of the round, nats per token, weighted by tokens
    sent_bytes  {down, up}: of this round's orders and updates
    silos       by silo: tokens, steps, loss, epochs by source, norm and cosine (to the mean) of the body's delta,
                down_bytes, up_bytes, seconds {load, score, train, save}
    refused     by silo: why its answer did not count
    away        by silo: why it takes no part (dropped, set aside, or it could not be made)
    scores      by source, measured *before* this round's training: of the state after `round` - 1; absent if not due:
                loss, perplexity, bits_per_byte, unigram_bits_per_byte, normalised, tokens, text_bytes
    mean        of scores: bits_per_byte and perplexity (means over sources), pooled_bits_per_byte and pooled_loss
                (all sources as one text)

A record of event "change" has run, round (the last one committed), time, `change` (what people asked for: see
`config.Change`), and `refused` where another change made it impossible. The last line of a finished run, of event
"scores", has run, round, time, scores, mean and refused of the final state. A source without validation text has no
scores; where there are none at all, `mean` holds nan.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, Score, SiloUpdate
from dept_ray.rounds.membership import Verdict
from dept_ray.rounds.state import RunState
from dept_ray.silo import score as figures


def round_record(
    job: Job, before: RunState, after: RunState, orders: Mapping[str, RoundOrder], verdict: Verdict, seconds: float
) -> dict[str, Any]:
    """The record of a committed round."""
    updates = verdict.accepted
    tokens = sum(u.tokens for u in updates.values())
    moved = None
    if before.body is not None and after.body is not None:
        moved = after.body.numpy() - before.body.numpy()
    silos = {name: _silo(orders[name], update, moved) for name, update in updates.items()}
    record: dict[str, Any] = {
        "event": "round",
        "run": job.name,
        "round": after.round,
        "attempt": next(iter(orders.values())).attempt,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "step": after.step,
        "tokens": sum(silo.tokens for silo in after.silos.values()),
        "loss": sum(u.loss * u.tokens for u in updates.values()) / tokens,
        "sent_bytes": {
            "down": sum(payload_bytes(order) for order in orders.values()),
            "up": sum(payload_bytes(update) for update in updates.values()),
        },
        "silos": silos,
        "refused": verdict.refused,
        "away": {name: silo.away for name, silo in after.silos.items() if silo.away},
    }
    scores = {source: score for update in updates.values() for source, score in update.scores.items()}
    return {**record, **scores_record(scores)} if scores else record


def past_seconds(history: Sequence[Mapping[str, Any]], rounds: int = 20) -> list[float]:
    """Seconds that silos took for whole rounds, over the last rounds: what a deadline is drawn from."""
    last = [record for record in history if record["event"] == "round"][-rounds:]
    return [sum(silo["seconds"].values()) for record in last for silo in record["silos"].values()]


def final_record(
    job: Job, round: int, scores: Mapping[str, Score], refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The record that closes a run."""
    about = {"event": "scores", "run": job.name, "round": round, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**about, **scores_record(scores), "refused": dict(refused or {})}


def scores_record(scores: Mapping[str, Score]) -> dict[str, Any]:
    """`scores` and `mean` of a record."""
    by_source = {
        source: {
            "loss": figures.loss(score),
            "perplexity": figures.perplexity(score),
            "bits_per_byte": figures.bits_per_byte(score),
            "unigram_bits_per_byte": figures.unigram_bits_per_byte(score),
            "normalised": figures.normalised(score),
            "tokens": score.tokens,
            "text_bytes": score.text_bytes,
        }
        for source, score in sorted(scores.items())
    }
    pooled = figures.pooled(scores.values())
    mean = {
        "bits_per_byte": figures.macro(s["bits_per_byte"] for s in by_source.values()),
        "perplexity": figures.macro(s["perplexity"] for s in by_source.values()),
        "pooled_bits_per_byte": figures.bits_per_byte(pooled),
        "pooled_loss": figures.loss(pooled),
    }
    return {"scores": by_source, "mean": mean}


def payload_bytes(message: "RoundOrder | SiloUpdate") -> int:
    """Bytes of the vectors in a message; the rest is some hundred bytes."""
    return sum(array.nbytes for array in (message.body, message.rows) if array is not None)


def _silo(order: RoundOrder, update: SiloUpdate, moved: np.ndarray | None) -> dict[str, Any]:
    return {
        "tokens": update.tokens,
        "steps": update.steps,
        "loss": update.loss,
        "epochs": {source: round(epochs, 4) for source, epochs in update.epochs.items()},
        "norm": update.body_norm,
        "cosine": _cosine(update.body, moved),
        "down_bytes": payload_bytes(order),
        "up_bytes": payload_bytes(update),
        "seconds": {what: round(s, 3) for what, s in update.seconds.items()},
    }


def _cosine(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    if a is None or b is None:
        return None
    norms = math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b)))
    return float(np.dot(a, b)) / norms if norms else None
