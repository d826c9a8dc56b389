"""Who works in a round, and whether it counts: facts in, decision out, no clock, no cluster, no memory.

An answer is accepted only if it is the answer to *this* order: run, round, attempt, the body it started from, the
shapes that were asked for, finite values and loss, and at least one token trained. Everything else is refused with a
reason, on record.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.messages import RoundOrder, SiloUpdate


def choose(job: Job, present: Iterable[str], round: int) -> list[str]:
    """S_t: `rounds.choose` of those present, uniformly without replacement, by a draw labelled with the round."""
    names = sorted(present)
    count = min(job.rounds.choose or len(names), len(names))
    drawn = generator(job.seed, "choose", round).permutation(len(names))[:count]
    return sorted(names[i] for i in drawn)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a round."""

    commit: bool
    accepted: dict[str, SiloUpdate]
    refused: dict[str, str]
    """Reason by silo."""


def judge(job: Job, orders: Mapping[str, RoundOrder], answers: Mapping[str, SiloUpdate | Exception]) -> Verdict:
    """Whether enough silos answered what they were asked."""
    accepted, refused = {}, {}
    for name in sorted(orders):
        answer = answers.get(name)
        reason = refusal(orders[name], answer)
        if reason is None and isinstance(answer, SiloUpdate):
            accepted[name] = answer
        else:
            refused[name] = str(reason)
    # Rounded first: 0.28 * 25 is a little more than 7, and 7 of 25 are 28 %.
    needed = max(1, math.ceil(round(job.rounds.quorum * len(orders), 9)))
    return Verdict(len(accepted) >= needed, accepted, refused)


def refusal(order: RoundOrder, answer: "SiloUpdate | Exception | None") -> str | None:
    """Why an answer does not count; None if it does."""
    if answer is None:
        return "no answer"
    if isinstance(answer, Exception):
        return f"{type(answer).__name__}: {answer}"
    asked = (order.run, order.silo, order.round, order.attempt, order.fingerprint)
    given = (answer.run, answer.silo, answer.round, answer.attempt, answer.fingerprint)
    if asked != given:
        return f"answers {given}, asked was {asked}"
    if order.steps and answer.tokens <= 0:
        return "trained no token"
    if order.steps and not math.isfinite(answer.loss):  # all that shows where the body stays home
        return f"loss: {answer.loss}, training diverged"
    for what, sent, back in (("body", order.body, answer.body), ("rows", order.rows, answer.rows)):
        if order.steps == 0:
            break
        if (sent is None) != (back is None):
            return f"{what}: {'missing' if back is None else 'was not asked for'}"
        if sent is None or back is None:
            continue
        if back.shape != sent.shape or back.dtype != np.float32:
            return f"{what}: {back.dtype} {back.shape}, asked was float32 {sent.shape}"
        if not np.isfinite(back).all():
            return f"{what}: not finite"
    return None
