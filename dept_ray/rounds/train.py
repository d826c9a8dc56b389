"""THE OUTER LOOP: Algorithm 1 of DEPT (arXiv 2410.05021) on one screen. Start reading here.

Each round: obey what people asked for, see who is here, choose silos, order them to train from the shared body, judge
what comes back, make the outer step, and let it be a fact, by one rename on disk: before anybody acts on it, and, where
silos live elsewhere, while they train the next round already. Where silos live (`pool`), where facts are kept
(`store`), who watches (`log`) and who interferes (`control`) are arguments; the same loop runs in process and on a
cluster, bit for bit.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from dept_ray.config import Job
from dept_ray.draws import fingerprint_of
from dept_ray.errors import DeptError, QuorumLost
from dept_ray.messages import RoundOrder, SiloCard
from dept_ray.metrics import Record
from dept_ray.rounds.changes import changed, donors_of, obey_people, with_newcomers
from dept_ray.rounds.control import Control
from dept_ray.rounds.ledger import Attempt, final_record, past_seconds, round_record
from dept_ray.rounds.membership import choose, deadline_s, judge, members
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.outer import outer_step
from dept_ray.rounds.pool import Deadline, SiloPool, nothing
from dept_ray.rounds.state import RunState, corpora_of, fresh_state, shared_body, shared_rows
from dept_ray.rounds.store import RunStore
from dept_ray.silo.snapshot import snapshot_round

Log = Callable[[dict[str, Any]], None]


def train(job: Job, pool: SiloPool, store: RunStore, log: Log, control: Control) -> RunState:
    """Train a job to its last round, from wherever its folder stands.

    Returns:
        The state after the last committed round.

    Raises:
        QuorumLost: a round failed `faults.attempts` times, or nobody is left.
        RunError, DataError: a silo or the folder cannot go on.
    """
    stands = store.stands()
    control.begin(stands.round, stands.heard, store)
    first, job = job, changed(job, stands.changes)
    pool.open(job, first)
    state = store.load(corpora_of(pool.cards)) or fresh_state(job, method_of(job), pool.cards)
    history, commit = store.history(), Commit()
    while True:
        if not pool.remote or control.asks or state.round >= job.rounds.total:
            pool.rest()
            commit()
            if control.take_checkpoint(state.round):
                store.keep(state.round)
            job, state = obey_people(job, state, pool, log, control)
        done = state.round >= job.rounds.total
        if (done and control.end()) or control.stopping:
            break
        if done or not control.begin_round():
            continue
        began = time.perf_counter()
        try:
            state, attempts = _until_it_counts(job, state, pool, store, history, commit)
        except DeptError:
            commit()  # the round before stands, whatever became of this one
            raise
        before, state = state, outer_step(job, state, attempts[-1].verdict.accepted, pool.cards)
        took_s = time.perf_counter() - began
        commit = Commit(partial(_make_fact, job, before, state, attempts, took_s, history, pool, store, log, control))
        if attempts[-1].verdict.refused:
            commit()  # who was lost is waited for, and nobody trains meanwhile
        del before, attempts  # and with them all deltas, once it is a fact
    commit()
    if state.round == job.rounds.total:
        log(_final_scores(job, state, pool, store))
    return state


class Commit:
    """What makes a round a fact: done once, when it is called first, and holding nothing from then on."""

    def __init__(self, make_fact: Callable[[], None] = nothing) -> None:
        self._make_fact = make_fact

    def __call__(self) -> None:
        make_fact, self._make_fact = self._make_fact, nothing
        make_fact()


def _make_fact(
    job: Job, before: RunState, state: RunState, attempts: Sequence[Attempt], took_s: float,
    history: list[Record], pool: SiloPool, store: RunStore, log: Log, control: Control,
) -> None:  # fmt: skip
    record = round_record(job, before, state, attempts, took_s)
    record["away"] |= pool.failed()
    store.save(state, record, corpora_of(pool.cards))  # now it is a fact
    control.committed(state.heard)
    history.append(record)
    log(record)


def _until_it_counts(
    job: Job, state: RunState, pool: SiloPool, store: RunStore, history: Sequence[Record], commit: "Commit"
) -> tuple[RunState, list[Attempt]]:
    """Order a round, again if need be, until a quorum answers; who came and who failed is on the state's record.

    The round before is committed while silos train.
    """
    what, reasons, attempts = "", dict[str, str](), list[Attempt]()
    for attempt in range(job.faults.attempts):
        ready = pool.ready()
        state = with_newcomers(state, ready, pool.cards)
        chosen = choose(job, members(state.silos, ready), state.round)
        if not chosen:
            what = "has nobody left to train it"
            break
        orders = orders_for(
            job, state, chosen, pool.cards, attempt=attempt, steps=job.inner.local_steps,
            life=store.life, kept=store.kept().values(), holds=_held(pool),
        )  # fmt: skip
        answers = pool.run_round(orders, _deadline(job, history, len(orders)), commit)
        verdict = judge(job, orders, answers)
        attempts.append(Attempt.of(orders, answers, verdict))
        failed = {k: state.silos[k].failed(reason, job.faults.failures) for k, reason in verdict.refused.items()}
        state = replace(state, silos=state.silos | failed)
        if verdict.commit:
            return state, attempts
        attempts[-1] = attempts[-1].lost
        what = f"failed {attempt + 1} times, {len(verdict.accepted)} of {len(chosen)} silos answered"
        reasons |= verdict.refused
        del answers, verdict  # a body each
    away = {name: silo.away for name, silo in state.silos.items() if silo.away}
    told = "; ".join(f"{silo}: {reason}" for silo, reason in sorted({**away, **pool.failed(), **reasons}.items()))
    raise QuorumLost(
        f"round {state.round + 1} {what} ({told}); round {state.round} stands: "
        "mend the cause and run the same command again"
    )


def _deadline(job: Job, history: Sequence[Record], asked: int) -> Deadline:
    return lambda took_s: deadline_s(job.faults, past_seconds(history), asked, took_s)


def orders_for(
    job: Job, state: RunState, silos: list[str], cards: Mapping[str, SiloCard], *, attempt: int, steps: int,
    life: int = 0, kept: Collection[Mapping[str, str]] = (), holds: Mapping[str, int] | None = None,
) -> dict[str, RoundOrder]:  # fmt: skip
    """What each silo is asked to do next.

    Args:
        job, state: what it follows from.
        silos: who is asked.
        cards: who owns which rows.
        attempt, life: the fence, together with the state's round.
        steps: inner steps; 0 only scores.
        kept: of each round that is kept for good, the snapshots that it names, by silo.
        holds: the round whose shared vectors a silo has in memory, by silo.
    """
    fingerprint = state.fingerprint or ("" if state.body is None else fingerprint_of(state.body.numpy()))
    held = {name: (holds or {}).get(name, -1) for name in silos}
    # One object for all who get the same: it is made, and put where silos read it, once.
    bodies = {round: shared_body(state, round) for round in set(held.values())}
    rows = shared_rows(state, {name: cards[name] for name in silos}, held)

    everything = cache(partial(shared_body, state, -1))

    def whole(order: RoundOrder) -> RoundOrder:
        rows = shared_rows(state, {order.silo: cards[order.silo]}, {order.silo: -1})
        return replace(order, body=everything(), rows=rows[order.silo])

    every = job.rounds.score_every
    due = steps == 0 or (every > 0 and state.round % every == 0)
    frozen, ahead = _frozen_steps(job, state, steps), _ahead_steps(job, state, steps)
    return {
        name: RoundOrder(
            run=job.name, silo=name, round=state.round, life=life, attempt=attempt,
            after=state.silos[name].snapshot, keep=tuple(round[name] for round in kept if name in round),
            position=state.silos[name].position, first_step=state.step, steps=steps, score=due, lr=job.inner.lr,
            total_steps=state.step + (job.rounds.total - state.round) * job.inner.local_steps,
            frozen_steps=frozen[name], ahead=ahead[name],
            donors=donors_of(job, state, name), donors_way=job.faults.newcomer_rows,
            fingerprint=fingerprint, codec=job.wire.codec, body=bodies[held[name]],
            rows=rows[name], whole=whole,
        )
        for name in silos
    }  # fmt: skip


def _frozen_steps(job: Job, state: RunState, steps: int) -> dict[str, int]:
    """By silo, how long it trains its embedding alone: a newcomer at first, all where the job says so."""
    joined = {source.name for source in job.sources if source.joined}
    return {
        name: steps if job.init.frozen_body else job.faults.newcomer_steps if name in joined and not silo.rounds else 0
        for name, silo in state.silos.items()
    }


def _ahead_steps(job: Job, state: RunState, steps: int) -> dict[str, int]:
    """By silo, how many steps go ahead of its order: none, unless it counted in the round before this one.

    Who did not stands too far from what is shared; and where nothing is, there is nothing to wait for.
    """
    shares = state.body is not None or state.rows is not None
    return {
        name: min(job.inner.ahead_steps, steps)
        if shares and silo.snapshot is not None and snapshot_round(silo.snapshot) == state.round - 1
        else 0
        for name, silo in state.silos.items()
    }


def _held(pool: SiloPool) -> dict[str, int]:
    return {name: status.holds for name, status in pool.statuses().items()}


def _final_scores(job: Job, state: RunState, pool: SiloPool, store: RunStore) -> dict[str, Any]:
    """What the finished model is worth on every source; a silo that fails is asked again."""
    scores, refused = {}, dict.fromkeys(members(state.silos, pool.ready()), "")
    for attempt in range(job.faults.attempts):
        there = sorted(refused.keys() & pool.ready())
        orders = orders_for(job, state, there, pool.cards, attempt=attempt, steps=0, life=store.life, holds=_held(pool))
        verdict = judge(job, orders, pool.run_round(orders, lambda took_s: job.faults.deadline_cap_s))
        scores |= {source: score for update in verdict.accepted.values() for source, score in update.scores.items()}
        refused = {name: verdict.refused.get(name, "not there") for name in refused.keys() - verdict.accepted.keys()}
        if not refused:
            break
    return final_record(job, state.round, scores, refused)
