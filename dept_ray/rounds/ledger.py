"""The record of a round: who did what, at which cost, and what came of it. Plain values, one JSON object.

A record of event "round" has

    run, round (1 is the first), attempt, time (ISO 8601), seconds
    step        global inner steps so far            tokens      trained so far, all silos
    loss        mean training loss of the round, nats per token, weighted by tokens
    sent_bytes  {down, up}: of this round's orders and answers, those of failed attempts and refused silos too
    silos       by silo: tokens, steps, loss, epochs by source, norm and cosine (to the mean) of the body's delta,
                down_bytes, up_bytes, seconds {load, score, train, code, save, send (on the way, both ways),
                wait (for the round's last answer), ahead (training before its order came; absent where there was
                none)}, flops (operations that its steps needed), peak_flops (FLOP/s that its devices can do; 0 where
                not known): MFU is flops / (seconds.train + seconds.ahead) / peak_flops; where measured,
                norms {step, body, embedding, activation}: lists, L2 norms of the parameters before global steps, and
                of the residual stream after the block where it is largest (mean over tokens); where its process was
                lost and another took the same order, for the steps that were left until the others had done theirs,
                lost (why)
    refused     by silo: why its answer did not count
    failed      attempts before this one that found no quorum: a list of {attempt, refused}; absent if none
    away        by silo: why it takes no part (dropped, set aside, or it could not be made)
    scores      by source, measured *before* this round's training: of the state after `round` - 1; absent if not due:
                loss, perplexity, bits_per_byte, unigram_bits_per_byte, normalised, tokens, text_bytes, held_out (true
                where the source is only scored; else absent)
    mean        of the scores of sources that are trained on: bits_per_byte and perplexity (means over sources),
                pooled_bits_per_byte and pooled_loss (all sources as one text)
    mean_held_out   the same of the others; absent where there are none

A record of event "change" has run, round (the last one committed), time, `change` (what people asked for: see
`messages.Change`), and `refused` where another change made it impossible. The last line of a finished run, of event
"scores", has run, round, time, scores, mean and refused of the final state. A source without validation text has no
scores; where there are none at all, `mean` holds nan.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dept_ray.codec import decoded
from dept_ray.config import Job
from dept_ray.messages import Delta, Held, RoundOrder, Score, SiloUpdate
from dept_ray.rounds.membership import Verdict
from dept_ray.rounds.state import RunState
from dept_ray.silo import score as figures


@dataclass(frozen=True)
class Attempt:
    """One try of a round, as it goes on record."""

    number: int
    verdict: Verdict
    down_bytes: dict[str, int]
    up_bytes: dict[str, int]

    @classmethod
    def of(
        cls, orders: Mapping[str, RoundOrder], answers: Mapping[str, "SiloUpdate | Exception"], verdict: Verdict
    ) -> "Attempt":
        """Counts what was sent, whether it counted or not."""
        updates = {name: answer for name, answer in answers.items() if isinstance(answer, SiloUpdate)}
        up = {name: payload_bytes(update) for name, update in updates.items()}
        down = {name: payload_bytes(order) for name, order in orders.items()}
        for name in [name for name, update in updates.items() if update.lost]:  # who was asked twice
            down[name] += payload_bytes(orders[name].from_nothing or orders[name])
        return cls(next(iter(orders.values())).attempt, verdict, down, up)

    @property
    def lost(self) -> "Attempt":
        """Without the answers, which hold a body each, of a quorum that was not."""
        return replace(self, verdict=replace(self.verdict, accepted={}))


def round_record(
    job: Job, before: RunState, after: RunState, attempts: Sequence[Attempt], seconds: float
) -> dict[str, Any]:
    """The record of a committed round: of its last attempt, and what those before it cost."""
    last, verdict = attempts[-1], attempts[-1].verdict
    updates = verdict.accepted
    tokens = sum(u.tokens for u in updates.values())
    moved = None
    if before.body is not None and after.body is not None:
        moved = after.body.numpy() - before.body.numpy()
    silos = {n: _silo(last.down_bytes[n], last.up_bytes[n], update, moved) for n, update in updates.items()}
    record: dict[str, Any] = {
        "event": "round",
        "run": job.name,
        "round": after.round,
        "attempt": last.number,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "step": after.step,
        "tokens": sum(silo.tokens for silo in after.silos.values()),
        "loss": sum(u.loss * u.tokens for u in updates.values()) / tokens,
        "sent_bytes": {
            "down": sum(sum(attempt.down_bytes.values()) for attempt in attempts),
            "up": sum(sum(attempt.up_bytes.values()) for attempt in attempts),
        },
        "silos": silos,
        "refused": verdict.refused,
        "away": {name: silo.away for name, silo in after.silos.items() if silo.away},
    }
    if len(attempts) > 1:
        record["failed"] = [{"attempt": a.number, "refused": a.verdict.refused} for a in attempts[:-1]]
    scores = {source: score for update in updates.values() for source, score in update.scores.items()}
    return {**record, **scores_record(scores, job.held_out)} if scores else record


def past_seconds(history: Sequence[Mapping[str, Any]], rounds: int = 20) -> list[float]:
    """Seconds from a silo's order to its answer, over the last rounds: what a deadline is drawn from."""
    last = [record for record in history if record["event"] == "round"][-rounds:]
    return [
        sum(s for what, s in silo["seconds"].items() if what not in ("wait", "ahead"))
        for record in last
        for silo in record["silos"].values()
    ]


def final_record(
    job: Job, round: int, scores: Mapping[str, Score], refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The record that closes a run."""
    about = {"event": "scores", "run": job.name, "round": round, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**about, **scores_record(scores, job.held_out), "refused": dict(refused or {})}


def scores_record(scores: Mapping[str, Score], held_out: Collection[str] = ()) -> dict[str, Any]:
    """`scores`, `mean` and `mean_held_out` of a record."""
    by_source = {source: _figures(score) for source, score in sorted(scores.items())}
    trained_on = [score for source, score in sorted(scores.items()) if source not in held_out]
    record: dict[str, Any] = {"scores": by_source, "mean": _mean(trained_on)}
    if aside := [source for source in by_source if source in held_out]:
        for name in aside:
            by_source[name]["held_out"] = True
        record["mean_held_out"] = _mean([scores[name] for name in aside])
    return record


def _figures(score: Score) -> dict[str, Any]:
    return {
        "loss": figures.loss(score),
        "perplexity": figures.perplexity(score),
        "bits_per_byte": figures.bits_per_byte(score),
        "unigram_bits_per_byte": figures.unigram_bits_per_byte(score),
        "normalised": figures.normalised(score),
        "tokens": score.tokens,
        "text_bytes": score.text_bytes,
    }


def _mean(scores: Sequence[Score]) -> dict[str, float]:
    pooled = figures.pooled(scores)
    return {
        "bits_per_byte": figures.macro(map(figures.bits_per_byte, scores)),
        "perplexity": figures.macro(map(figures.perplexity, scores)),
        "pooled_bits_per_byte": figures.bits_per_byte(pooled),
        "pooled_loss": figures.loss(pooled),
    }


def payload_bytes(message: "RoundOrder | SiloUpdate") -> int:
    """Bytes of the vectors in a message, as they travel; the rest is some hundred bytes."""
    vectors = [vector for vector in (message.body, message.rows) if vector is not None]
    return sum((vector.fetch() if isinstance(vector, Held) else vector).nbytes for vector in vectors)


def _silo(down_bytes: int, up_bytes: int, update: SiloUpdate, moved: np.ndarray | None) -> dict[str, Any]:
    about = {
        "tokens": update.tokens,
        "steps": update.steps,
        "loss": update.loss,
        "epochs": {source: round(epochs, 4) for source, epochs in update.epochs.items()},
        "norm": update.body_norm,
        "cosine": _cosine(update.delta("body"), moved),
        "down_bytes": down_bytes,
        "up_bytes": up_bytes,
        "seconds": {what: round(s, 3) for what, s in update.seconds.items()},
        "flops": update.flops,
        "peak_flops": update.peak_flops,
    }
    return {**about, **{key: told for key, told in (("norms", update.norms), ("lost", update.lost)) if told}}


def _cosine(delta: Delta | None, b: np.ndarray | None) -> float | None:
    if delta is None or b is None:
        return None
    a = decoded(delta)
    norms = math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b)))
    return float(np.dot(a, b)) / norms if norms else None
