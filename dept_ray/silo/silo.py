"""One source's whole state and its one duty: obey a `RoundOrder`, return a `SiloUpdate`.

A silo owns text, vocabulary, embedding, optimizer moments and, where bodies stay home, its own body. What it holds in
memory is always "after snapshot X"; an order that says otherwise makes it reload X, or begin afresh. So a silo
that ran ahead of a lost round, died, or moved to another machine continues exactly where the manifest says.
Knows nothing of other silos, of the outer step, or of Ray.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from dept_ray.codec import finite_norm
from dept_ray.config import Job
from dept_ray.messages import RoundOrder, Score, SiloCard, SiloSpec, SiloStatus, SiloUpdate
from dept_ray.silo.ahead import Ahead, Early
from dept_ray.silo.crew import Ranks, Start, start_processes
from dept_ray.silo.donors import first_tables
from dept_ray.silo.flops import flops_per_token
from dept_ray.silo.fresh import fresh_shared
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.inner import NOTHING, Trained
from dept_ray.silo.rank import Listener, Rank, Run
from dept_ray.silo.score import score_corpus, score_text
from dept_ray.silo.snapshot import load_snapshot, prune_snapshots, save_snapshot, silo_folder, snapshot_name
from dept_ray.silo.team import ALONE, Team
from dept_ray.silo.wire import Shared, Wire
from dept_ray.text.stream import Position, Read
from dept_ray.text.tokenizer import check_rows

NEVER = (-1, -1)
"""The round and attempt that nobody stops."""
_UNUSED = 1e-9
"""Share of a token that a text has not: next to nothing beside any use, and a row that nobody uses is all owners'."""
NOWHERE = "nowhere"
"""What memory is after before it was loaded, or while it trains: equal to no snapshot."""


class Silo:
    """One source in training.

    Args:
        job: the run.
        spec: what this silo is.
        read: how blocks become tokens, ahead of time; None reads the shards in this process.
        clock: seconds, for what is reported.
        start: how its other ranks are started, where it has some.
        run: calls what makes its steps, or scores.

    Raises:
        ShardError: its shards are missing or altered.
        SiloError: they are too few for one batch.
    """

    def __init__(
        self, job: Job, spec: SiloSpec, read: Read | None = None, clock: Callable[[], float] = time.perf_counter,
        start: Start = start_processes, run: Run = lambda compute: compute(),
    ) -> None:  # fmt: skip
        self.job, self.spec, self._clock, self._run = job, spec, clock, run
        self._rank = Rank(job, spec, read=read, run=run)
        self._learner = learner = self._rank.learner
        self.corpora, self.vocabulary, self.stream = self._rank.corpora, self._rank.vocabulary, self._rank.stream
        self.model, self.body = learner.model, learner.body
        self._after: str | None = NOWHERE
        self._early = Early(job, learner.vectors)
        self._stop_at, self._stopping = NEVER, threading.Lock()
        self._others = Ranks(job, replace(spec, shard=learner.hardware.shard), start)
        # What a run begins from is not on every silo's machine: it comes with the first order.
        draws = job.wire.codec != "fp32" and job.init.origin is None
        self._wire = Wire(spec.silo, fresh_shared(job, spec, self.card()) if draws else {})
        self._status = SiloStatus(spec.silo)

    # ------------------------------------------------------------------------------------ what others may ask
    @property
    def hardware(self) -> Hardware:
        """What it runs on."""
        return self._learner.hardware

    def card(self) -> SiloCard:
        """Who this is; no row ids and no tokens unless rows are shared."""
        share = self.spec.share_rows
        return SiloCard(
            silo=self.spec.silo,
            sources=self.spec.sources,
            vocabulary_size=self.vocabulary.size,
            train_tokens={name: self.corpora[name].train.tokens for name in self.spec.sources},
            fingerprints={name: corpus.fingerprint for name, corpus in self.corpora.items()},
            owned_rows=self.vocabulary.ids if share else None,
            row_uses=self._row_uses() if share and self.job.outer.row_weights == "uses" else None,
            global_vocabulary_size=self.vocabulary.global_size if share else 0,
            hardware=str(self.hardware),
        )

    @property
    def status(self) -> SiloStatus:
        """What it does, and what it holds, at this moment; may be asked for from another thread."""
        return replace(self._status, holds=self._wire.holds)

    def stop(self, round: int, attempt: int) -> None:
        """Ask the training of that round, or of one before, to hand in what it has, or steps begun after it to end.

        May be called from another thread. What was asked sooner may be heard later, and takes nothing back.
        """
        with self._stopping:
            self._stop_at = max(self._stop_at, (round, attempt))

    def obey(self, order: RoundOrder) -> SiloUpdate:
        """Train (or only score) as ordered.

        Returns:
            The update with deltas of what is shared; the silo's snapshot is on disk before it returns.

        Raises:
            SiloError: the order does not fit this silo.
            StoreError: the snapshot it names cannot be read, or the new one not be written.
        """
        torch.set_num_threads(self.spec.threads)
        seconds: dict[str, float] = {}
        ahead = self._early.made_for(order)
        self._say("loading", order)
        with self._timed("load", seconds):
            if ahead is None:
                self._restore(order)
            shared = self._wire.receive(order, self._learner.vectors.take)
            if order.steps:
                self._others.assemble()
        scores: dict[str, Score] = {}
        if order.score:
            self._say("scoring", order)
            with self._timed("score", seconds):
                scores = self._run(self.score)
        if order.steps == 0:
            self._say("waiting", order)
            return self._answer(order, NOTHING, None, order.position, scores, seconds)
        self._after = NOWHERE  # until it is saved, what is in memory has no name
        with self._timed("train", seconds):
            trained = self._train(order, shared, ahead)
        if ahead is not None:
            seconds["ahead"] = ahead.seconds
        with self._stopping:  # what was asked of its steps ahead, or of a later order, still stands
            self._stop_at = NEVER if self._stop_at <= order.fence else self._stop_at
        position = self.stream.advance(order.position, trained.steps)
        self._say("saving", order)
        with self._timed("code", seconds):
            deltas = {what: self._learner.vectors.read(what) - vector for what, vector in shared.items()}  # equation 1
            norm = finite_norm(deltas["body"]) if "body" in deltas else 0.0
            sent = self._wire.send(order.codec, deltas)
        with self._timed("save", seconds):
            snapshot = self._save(order, position, shared)
        self._early.expect(order, snapshot, position)
        update = self._answer(order, trained, snapshot, position, scores, seconds)
        self._say("waiting", order)
        return replace(update, body_norm=norm, body=sent.get("body"), rows=sent.get("rows"))

    def go_ahead(self) -> None:
        """Make steps of the next round while its order is not here, where there are any; returns once stopped.

        Raises:
            ShardError: its text cannot be read. Nothing is lost: the order will find it out.
        """
        if (order := self._early.expected()) is None:
            return
        torch.set_num_threads(self.spec.threads)
        self._say("going ahead", order)
        self._restore(order)
        self._after = NOWHERE
        batches = islice(self._rank.batches(order), order.ahead)
        self._early.make(order, lambda: self._steps(order, ALONE, batches), self._clock)
        self._say("waiting", order)

    def score(self) -> dict[str, Score]:
        """Validation of every source that has some, with the parameters as they are."""
        context, rows = self.job.inner.context, self._rows_scored
        with self._learner.on_device() as model:
            return {
                name: score_corpus(model, corpus, self.vocabulary, context, rows, self.hardware)
                for name, corpus in self.corpora.items()
                if corpus.validation.tokens
            }

    def close(self) -> None:
        """Stop reading ahead, and let the other ranks go."""
        self._rank.close()
        self._others.close()

    def score_text(self, source: str, text: str) -> Score:
        """Any text as a source's tokenizer cuts it, with the parameters as they are.

        Raises:
            VocabularyError: it holds a token that a trimmed vocabulary has not.
        """
        context, rows, corpus = self.job.inner.context, self._rows_scored, self.corpora[source]
        ids = corpus.tokenizer.encode(text, add_special_tokens=False).ids
        check_rows(self.vocabulary, corpus.tokenizer, ids, "the text", source)
        with self._learner.on_device() as model:
            return score_text(model, text, ids, corpus, self.vocabulary, context, rows, self.hardware)

    @property
    def _rows_scored(self) -> int:
        """Sequences per forward pass."""
        return max(1, 8192 // self.job.inner.context)

    def _row_uses(self) -> np.ndarray:
        """(V_k,): of all training tokens, the share that each row is, never quite nothing."""
        counts = np.sum([self.corpora[name].counts for name in self.spec.sources], axis=0)
        mine = counts if self.vocabulary.ids is None else counts[self.vocabulary.ids]
        return np.maximum(mine / counts.sum(), _UNUSED)

    # ------------------------------------------------------------------------------------ the parts of obeying
    def _train(self, order: RoundOrder, shared: Shared, ahead: Ahead | None) -> Trained:
        """The steps of an order, those first that go ahead of it, but for what was made of them already."""
        self._say("training", order)
        if self.spec.reset_embedding and order.round > 0:
            self._learner.draw_tokens(order.round)
        made = NOTHING if ahead is None else ahead.trained
        batches = self._rank.batches(order, made.steps)
        with self._others.following(order, self._learner.moments) as team:
            if order.ahead:
                with self._early.ahead_of(shared, ahead):
                    made = self._steps(order, team, islice(batches, order.ahead - made.steps), made)
            return self._steps(order, team, batches, made)

    def _steps(self, order: RoundOrder, team: Team, batches: Iterable[np.ndarray], made: Trained = NOTHING) -> Trained:
        """Steps of an order on some of its batches, as rank 0, until they are to stop."""

        def watch(step: int, loss: float, tokens_per_s: float) -> None:
            self._say(self._status.doing, order, step=step, loss=loss, tokens_per_s=tokens_per_s)

        @contextmanager
        def compiling() -> Iterator[None]:
            doing = self._status.doing
            self._say("compiling", order)
            yield
            self._say(doing, order)

        listener = Listener(lambda: self._stop_at >= order.fence, watch, compiling)
        return self._rank.steps(order, team, batches, made, listener)

    def _restore(self, order: RoundOrder) -> None:
        """Make memory equal to the snapshot that an order names (None: to a fresh silo), unless it is already."""
        if (after := order.after) == self._after and after != NOWHERE:
            if not self._learner.keeps_moments:
                self._learner.optimizer.forget()
            return
        self._after = NOWHERE  # until all of it is read
        parts = {} if after is None else load_snapshot(silo_folder(self.job, self.spec.silo) / after)[0]
        self._learner.load(parts, lambda: first_tables(self.job, self.spec, self.corpora, self.vocabulary, order))
        self._wire.load(parts.get("residual", {}))
        self._early.load(parts.get("left", {}))
        self._after = after

    def _save(self, order: RoundOrder, position: Position, shared: Collection[str]) -> str:
        """Write what stays home and, where it is needed, what is `shared` as it stands here."""
        name = snapshot_name(order.round, order.life, order.attempt)
        parts = self._learner.parts()
        if residual := self._wire.parts():
            parts["residual"] = residual
        if left := self._early.leave(shared):
            parts["left"] = left
        folder = silo_folder(self.job, self.spec.silo)
        about = {
            "run": self.job.name,
            "silo": self.spec.silo,
            "round": order.round,
            "life": order.life,
            "attempt": order.attempt,
            "position": position,
        }
        save_snapshot(folder / name, parts, about)
        prune_snapshots(folder, order.after, name, self.job.rounds.keep, order.keep)
        self._after = name
        return name

    def _answer(self, order: RoundOrder, trained: Trained, snapshot: str | None, position: Position,
                scores: dict[str, Score], seconds: dict[str, float]) -> SiloUpdate:  # fmt: skip
        return SiloUpdate(
            run=order.run, silo=order.silo, round=order.round, life=order.life, attempt=order.attempt,
            fingerprint=order.fingerprint, steps=trained.steps, tokens=trained.tokens, position=position,
            snapshot=snapshot, loss=trained.loss, scores=scores, epochs=self.stream.epochs(position), seconds=seconds,
            flops=trained.tokens * flops_per_token(self.job.model, self.job.inner.context, self.vocabulary.size),
            peak_flops=self.hardware.peak_flops, norms=trained.norms,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------ the rest
    def _say(self, doing: str, order: RoundOrder, **more: float) -> None:
        now: dict[str, Any] = {"doing": doing, "round": order.round, "steps": order.steps, "step": 0, **more}
        if order.round != self._status.round:
            now = {"loss": math.nan, **now}  # that of another round
        self._status = replace(self._status, **now)

    @contextmanager
    def _timed(self, what: str, seconds: dict[str, float]) -> Iterator[None]:
        began = self._clock()
        yield
        seconds[what] = self._clock() - began
