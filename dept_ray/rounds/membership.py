"""Who works in a round, how long it may take, and whether it counts: facts in, decision out; no clock, no cluster.

An answer is accepted only if it is the answer to *this* order: run, round, attempt, the body it started from, the
shapes that were asked for, finite values and loss, at least one token trained, and a body delta no larger than so many
times the round's median. Everything else is refused with a reason, on record.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from dept_ray.config import FaultsSection, Job
from dept_ray.draws import generator
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.rounds.state import SiloRecord


def members(silos: Mapping[str, SiloRecord], ready: Iterable[str]) -> list[str]:
    """Those who can be chosen: ready to take an order, neither dropped nor set aside."""
    return sorted(name for name in ready if name in silos and not silos[name].away)


def choose(job: Job, present: Iterable[str], round: int) -> list[str]:
    """S_t: `rounds.choose` of those present, uniformly without replacement, by a draw labelled with the round."""
    names = sorted(present)
    count = min(job.rounds.choose or len(names), len(names))
    drawn = generator(job.seed, "choose", round).permutation(len(names))[:count]
    return sorted(names[i] for i in drawn)


def deadline_s(faults: FaultsSection, past_s: Sequence[float]) -> float:
    """Seconds a round may take: median + k * MAD of the silos' past seconds, between floor and cap.

    >>> deadline_s(FaultsSection(deadline_floor_s=1, deadline_mads=2), [100, 110, 130])
    130.0
    """
    if not past_s:
        return faults.deadline_cap_s
    middle = median(past_s)
    spread = median(abs(s - middle) for s in past_s)
    wanted = max(middle + faults.deadline_mads * spread, faults.deadline_floor_s)
    return float(min(wanted, faults.deadline_cap_s))


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
        reason = refusal(orders[name], answer) or _overstated(job, orders[name], answer)
        if reason is None and isinstance(answer, SiloUpdate):
            accepted[name] = answer
        else:
            refused[name] = str(reason)
    _bound_norms(job.faults, accepted, refused)
    # Rounded first: 0.28 * 25 is a little more than 7, and 7 of 25 are 28 %.
    needed = max(1, math.ceil(round(job.faults.quorum * len(orders), 9)))
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
    if not order.steps:
        return None
    if answer.tokens <= 0:
        return "trained no token"
    if not 0 < answer.steps <= order.steps:
        return f"says that it trained {answer.steps} of {order.steps} steps"
    if not math.isfinite(answer.loss):  # all that shows where the body stays home
        return f"loss: {answer.loss}, training diverged"
    for what, sent, back in (("body", order.body, answer.body), ("rows", order.rows, answer.rows)):
        reason = _misfit(what, sent, back)
        if reason is not None:
            return reason
    return None


def _overstated(job: Job, order: RoundOrder, answer: "SiloUpdate | Exception | None") -> str | None:
    """Whether a silo claims other tokens than its steps are worth: they are its weight in the mean."""
    if not isinstance(answer, SiloUpdate) or not order.steps:
        return None
    worth = answer.steps * job.inner.batch_size * job.inner.context
    return None if answer.tokens == worth else f"claims {answer.tokens} tokens for {answer.steps} steps, worth {worth}"


def _misfit(what: str, sent: np.ndarray | None, back: np.ndarray | None) -> str | None:
    """Why a delta is not what was asked for."""
    if (sent is None) != (back is None):
        return f"{what}: {'missing' if back is None else 'was not asked for'}"
    if sent is None or back is None:
        return None
    if back.shape != sent.shape or back.dtype != np.float32:
        return f"{what}: {back.dtype} {back.shape}, asked was float32 {sent.shape}"
    return None if np.isfinite(back).all() else f"{what}: not finite"


def _bound_norms(faults: FaultsSection, accepted: dict[str, SiloUpdate], refused: dict[str, str]) -> None:
    """Refuse or scale down deltas much larger than the round's median; the norms are measured here, not believed.

    Body and rows are bounded alike. With two silos there is no majority to say which one is wrong: nothing is bounded.
    """
    for what in ("body", "rows"):
        norms = {k: _norm(getattr(u, what)) for k, u in accepted.items() if getattr(u, what) is not None}
        moved = [norm for norm in norms.values() if norm > 0]  # newcomers with a frozen body say nothing of size
        if len(moved) < 3:
            continue
        middle = median(moved)
        for name, norm in norms.items():
            if norm <= faults.norm_limit * middle:
                continue
            if faults.norm_policy == "clip":  # to the median: at the limit one liar would still outweigh all others
                scaled = getattr(accepted[name], what) * np.float32(middle / norm)
                accepted[name] = replace(accepted[name], **{what: scaled})
            else:
                refused[name] = f"{what}: norm {norm:.3g} is over {faults.norm_limit:g} times the round's median"
                accepted.pop(name, None)


def _norm(delta: np.ndarray) -> float:
    flat = delta.ravel()
    with np.errstate(over="ignore"):  # what fp32 cannot square is infinitely too large
        return math.sqrt(float(np.dot(flat, flat)))
