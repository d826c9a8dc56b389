"""Who works in a round, how long it may take, and whether it counts: facts in, decision out; no clock, no cluster.

An answer is accepted only if it is the answer to *this* order: run, round, life, attempt, the body it started from,
the shapes that were asked for, finite values and loss, one step at least, tokens and a position that its steps account
for, and deltas no larger than so many times the round's median. Else it is refused with a reason, on record.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from dept_ray.codec import Coded, Moves, decoded
from dept_ray.config import Job
from dept_ray.draws import generator
from dept_ray.errors import DeptError
from dept_ray.messages import Delta, RoundOrder, SiloUpdate, fetched, norm_found
from dept_ray.rounds.state import SiloRecord
from dept_ray.sections import FaultsSection
from dept_ray.silo.snapshot import snapshot_name

SHARED = ("body", "rows")
"""What may travel."""


def members(silos: Mapping[str, SiloRecord], ready: Iterable[str]) -> list[str]:
    """Those who can be chosen: ready to take an order, neither dropped nor set aside."""
    return sorted(name for name in ready if name in silos and not silos[name].away)


def choose(job: Job, present: Iterable[str], round: int) -> list[str]:
    """S_t: `rounds.choose` of those present, uniformly without replacement, by a draw labelled with the round."""
    names = sorted(present)
    count = min(job.rounds.choose or len(names), len(names))
    drawn = generator(job.seed, "choose", round).permutation(len(names))[:count]
    return sorted(names[i] for i in drawn)


def deadline_s(faults: FaultsSection, past_s: Sequence[float], asked: int = 0, took_s: Sequence[float] = ()) -> float:
    """Seconds a round may take: median + k * MAD of what silos took, between floor and cap.

    Args:
        faults: k, floor and cap.
        past_s: what they took in past rounds.
        asked: silos that work in this round.
        took_s: what those that have answered took in it. Without a past, most of them speak for it; fewer say nothing,
            and the cap holds.

    >>> deadline_s(FaultsSection(deadline_floor_s=1, deadline_mads=2), [100, 110, 130])
    130.0
    """
    known = past_s or (took_s if 2 * len(took_s) > asked else ())
    if not known:
        return faults.deadline_cap_s
    middle = median(known)
    spread = median(abs(s - middle) for s in known)
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
    accepted, refused, sizes = dict[str, SiloUpdate](), dict[str, str](), dict[str, dict[str, Size]]()
    for name in sorted(orders):
        answer = answers.get(name)
        try:
            reason = refusal(orders[name], answer, job.held_out) or _unaccounted(job, orders[name], answer)
            if reason is None and isinstance(answer, SiloUpdate):
                sizes[name] = found = _sizes(answer)
                reason = next((f"{what}: not finite" for what, size in found.items() if math.isnan(size.norm)), None)
        except DeptError as err:  # its delta was lost after it had answered
            reason = f"{type(err).__name__}: {err}"
        if reason is None and isinstance(answer, SiloUpdate):
            accepted[name] = answer
        else:
            refused[name] = str(reason)
    _bound_norms(job.faults, accepted, refused, sizes)
    # Rounded first: 0.28 * 25 is a little more than 7, and 7 of 25 are 28 %.
    needed = max(1, math.ceil(round(job.faults.quorum * len(orders), 9)))
    return Verdict(len(accepted) >= needed, accepted, refused)


def refusal(order: RoundOrder, answer: "SiloUpdate | Exception | None", held_out: Iterable[str] = ()) -> str | None:
    """Why an answer does not count; None if it does. Sources that are `held_out` may be scored too."""
    if answer is None:
        return "no answer"
    if isinstance(answer, Exception):
        return f"{type(answer).__name__}: {answer}"
    asked = (order.run, order.silo, order.round, order.life, order.attempt, order.fingerprint)
    given = (answer.run, answer.silo, answer.round, answer.life, answer.attempt, answer.fingerprint)
    if asked != given:
        return f"answers {given}, asked was {asked}"
    if strange := answer.scores.keys() - order.position.keys() - set(held_out):
        return f"scores {', '.join(sorted(strange))}, which it does not train on"
    if not order.steps:
        return None
    if answer.tokens <= 0:
        return "trained no token"
    if not 0 < answer.steps <= order.steps:
        return f"says that it trained {answer.steps} of {order.steps} steps"
    if not math.isfinite(answer.loss):  # all that shows where the body stays home
        return f"loss: {answer.loss}, training diverged"
    for what, sent in (("body", order.body), ("rows", order.rows)):
        reason = _misfit(what, order.codec, sent, answer.delta(what))
        if reason is not None:
            return reason
    return None


def _unaccounted(job: Job, order: RoundOrder, answer: "SiloUpdate | Exception | None") -> str | None:
    """Whether a silo claims other than its steps are worth: tokens (its weight in the mean), text, its snapshot."""
    if not isinstance(answer, SiloUpdate) or not order.steps:
        return None
    blocks = answer.steps * job.inner.batch_size
    if answer.tokens != blocks * job.inner.context:
        return f"claims {answer.tokens} tokens for {answer.steps} steps, worth {blocks * job.inner.context}"
    moved = {source: answer.position.get(source, 0) - at for source, at in order.position.items()}
    if answer.position.keys() != order.position.keys() or min(moved.values()) < 0 or sum(moved.values()) != blocks:
        return f"stands at {answer.position} after {answer.steps} steps from {order.position}, worth {blocks} blocks"
    expected = snapshot_name(order.round, order.life, order.attempt)
    return None if answer.snapshot == expected else f"names snapshot {answer.snapshot}, asked was {expected}"


def _misfit(what: str, codec: str, sent: np.ndarray | Moves | None, back: Delta | None) -> str | None:
    """Why a delta has not the form that was asked for."""
    if (sent is None) != (back is None):
        return f"{what}: {'missing' if back is None else 'was not asked for'}"
    if sent is None or back is None:
        return None
    if codec != "fp32":
        wrong = back.misfit(codec, sent.shape) if isinstance(back, Coded) else f"asked was {codec} {sent.shape}"
        return wrong and f"{what}: {wrong}"
    if isinstance(back, Coded):
        return f"{what}: {back.codec} {back.shape}, asked was float32 {sent.shape}"
    if back.shape != sent.shape or back.dtype != np.float32:
        return f"{what}: {back.dtype} {back.shape}, asked was float32 {sent.shape}"
    return None


@dataclass(frozen=True)
class Size:
    """Of a delta."""

    norm: float
    """L2; nan where a value is not finite."""
    length: int
    """Values of the body, rows of the rows."""


def _bound_norms(
    faults: FaultsSection,
    accepted: dict[str, SiloUpdate],
    refused: dict[str, str],
    sizes: Mapping[str, dict[str, Size]],
) -> None:
    """Refuse or scale down deltas much larger than the round's median; the norms are measured here, not believed.

    Body and rows are bounded alike. One who made more steps than another may have gone as many times further, and one
    who owns more rows has a longer vector of them. With two silos there is no majority to say which one is wrong:
    nothing is bounded.
    """
    steps = {name: update.steps for name, update in accepted.items()}
    for what in SHARED:
        norms = {k: sizes[k][what].norm for k in accepted if what in sizes[k]}
        # Newcomers with a frozen body say nothing of size.
        moved = [k for k, norm in norms.items() if norm > 0 and steps[k]]
        if len(moved) < 3:
            continue
        for name, norm in norms.items():
            more = {
                k: max(1.0, steps[name] / steps[k])
                * max(1.0, math.sqrt(sizes[name][what].length / sizes[k][what].length))
                for k in moved
            }
            middle = median(norms[k] * more[k] for k in moved)
            if norm <= faults.norm_limit * middle:
                continue
            if faults.norm_policy == "clip":  # to the median: at the limit one liar would still outweigh all others
                delta = accepted[name].delta(what)
                assert delta is not None
                scaled = decoded(delta) * np.float32(middle / norm)
                accepted[name] = replace(accepted[name], **{what: scaled})
            else:
                refused[name] = f"{what}: norm {norm:.3g} is over {faults.norm_limit:g} times the round's median"
                accepted.pop(name, None)


def _sizes(answer: SiloUpdate) -> dict[str, Size]:
    vectors = {what: vector for what in SHARED if (vector := getattr(answer, what)) is not None}
    return {what: Size(norm_found(vector), fetched(vector).shape[0]) for what, vector in vectors.items()}
