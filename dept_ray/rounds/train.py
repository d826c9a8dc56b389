"""THE OUTER LOOP: Algorithm 1 of DEPT (arXiv 2410.05021) on one screen. Start reading here.

Each round: choose silos, order them to train from the shared body, judge what comes back, make the outer step, and
only then, by one rename on disk, let it be a fact. Where silos live (`pool`), where facts are kept (`store`), who
watches (`log`) and who interferes (`control`) are arguments; the same loop runs in process and on a cluster, bit for
bit.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.errors import QuorumLost
from dept_ray.messages import RoundOrder, SiloCard
from dept_ray.rounds.control import Control
from dept_ray.rounds.ledger import final_record, round_record
from dept_ray.rounds.membership import Verdict, choose, judge
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.outer import outer_step
from dept_ray.rounds.pool import SiloPool
from dept_ray.rounds.state import RunState, fresh_state, rows_of
from dept_ray.rounds.store import RunStore

Log = Callable[[dict[str, Any]], None]


def train(job: Job, pool: SiloPool, store: RunStore, log: Log, control: Control) -> RunState:
    """Train a job to its last round, from wherever its folder stands.

    Returns:
        The state after the last committed round.

    Raises:
        QuorumLost: a round failed `rounds.attempts` times.
        RunError, DataError: a silo or the folder cannot go on.
    """
    cards = pool.open()
    corpora = {source: fingerprint for card in cards.values() for source, fingerprint in card.fingerprints.items()}
    state = store.load(corpora) or fresh_state(job, method_of(job), cards)
    while state.round < job.rounds.total and not control.stopping:
        began = time.perf_counter()
        chosen = choose(job, cards, state.round)
        orders, verdict = _until_it_counts(job, state, chosen, cards, pool)
        before, state = state, outer_step(job, state, verdict.accepted, cards)
        record = round_record(job, before, state, orders, verdict, time.perf_counter() - began)
        store.save(state, record, corpora)  # now it is a fact
        log(record)
    if state.round == job.rounds.total:
        log(_final_scores(job, state, cards, pool))
    return state


def _until_it_counts(
    job: Job, state: RunState, chosen: list[str], cards: Mapping[str, SiloCard], pool: SiloPool
) -> tuple[dict[str, RoundOrder], Verdict]:
    """Order a round, again if need be, until a quorum answers."""
    verdict = None
    for attempt in range(job.rounds.attempts):
        orders = orders_for(job, state, chosen, cards, attempt=attempt, steps=job.inner.local_steps)
        verdict = judge(job, orders, pool.run_round(orders))
        if verdict.commit:
            return orders, verdict
    assert verdict is not None
    reasons = "; ".join(f"{silo}: {reason}" for silo, reason in verdict.refused.items())
    raise QuorumLost(
        f"round {state.round + 1} failed {job.rounds.attempts} times, {len(verdict.accepted)} of {len(chosen)} silos "
        f"answered ({reasons}); round {state.round} stands: mend the cause and run the same command again"
    )


def orders_for(
    job: Job, state: RunState, silos: list[str], cards: Mapping[str, SiloCard], *, attempt: int, steps: int
) -> dict[str, RoundOrder]:
    """What each silo is asked to do next; `steps` = 0 only scores."""
    body = None if state.body is None else state.body.numpy()
    fingerprint = "" if body is None else checksum(body)
    every = job.rounds.score_every
    due = steps == 0 or (every > 0 and state.round % every == 0)
    return {
        name: RoundOrder(
            run=job.name, silo=name, round=state.round, attempt=attempt, after=state.silos[name].snapshot,
            position=state.silos[name].position, first_step=state.round * job.inner.local_steps, steps=steps, score=due,
            fingerprint=fingerprint, body=body,
            rows=None if state.rows is None else state.rows[rows_of(cards[name], len(state.rows))].numpy(),
        )
        for name in silos
    }  # fmt: skip


def _final_scores(job: Job, state: RunState, cards: Mapping[str, SiloCard], pool: SiloPool) -> dict[str, Any]:
    """What the finished model is worth on every source; a silo that fails is asked again."""
    scores, refused = {}, dict.fromkeys(sorted(cards), "")
    for attempt in range(job.rounds.attempts):
        orders = orders_for(job, state, list(refused), cards, attempt=attempt, steps=0)
        verdict = judge(job, orders, pool.run_round(orders))
        scores |= {source: score for update in verdict.accepted.values() for source, score in update.scores.items()}
        refused = verdict.refused
        if not refused:
            break
    return final_record(job, state.round, scores, refused)
