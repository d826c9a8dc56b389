"""What a run *is* between two rounds: one immutable value, saved whole or not at all.

Where bodies stay home `body` is None; where embeddings stay home `rows` is None. `rows` holds the V token rows of the
global vocabulary and, below them, the L learned positions: positions are rows that everybody owns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dept_ray.codec import Coded, Moves
from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import Change, SiloCard, SiloUpdate
from dept_ray.rounds.methods import Method, silos_of
from dept_ray.silo.fresh import fresh_body, fresh_rows


@dataclass(frozen=True)
class SiloRecord:
    """What the run knows of one silo."""

    snapshot: str | None = None
    """Its snapshot after the last round it took part in; None: it never did."""
    position: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    tokens: int = 0
    failures: int = 0
    """In a row, since it last counted."""
    away: str = ""
    """Why it takes no part: dropped, or set aside after so many failures; empty: it does."""

    def after(self, update: SiloUpdate) -> "SiloRecord":
        """The record once an update has counted."""
        return SiloRecord(update.snapshot, update.position, self.rounds + 1, self.tokens + update.tokens)

    def failed(self, reason: str, limit: int) -> "SiloRecord":
        """The record once the silo has failed; after `limit` failures in a row it is set aside."""
        failures = self.failures + 1
        away = f"set aside after {failures} failures in a row, the last: {reason}" if failures >= limit else ""
        return replace(self, failures=failures, away=away)


@dataclass(frozen=True)
class Move:
    """A round's step, coded."""

    base: int
    """Rounds committed before it."""
    body: Coded | None
    rows: Coded | None
    """(V + L, D)."""

    @property
    def nbytes(self) -> int:
        return sum(coded.nbytes for coded in (self.body, self.rows) if coded is not None)


@dataclass(frozen=True)
class RunState:
    """Everything that a committed round is."""

    round: int
    """Rounds committed."""
    silos: dict[str, SiloRecord]
    body: torch.Tensor | None = None
    """theta: (n,) fp32 in the order of `Layout`."""
    rows: torch.Tensor | None = None
    """phi and psi: (V + L, D) fp32."""
    body_momentum: torch.Tensor | None = None
    rows_momentum: torch.Tensor | None = None
    body_residual: torch.Tensor | None = None
    """What the steps that were sent lack so far; None where nothing is rounded."""
    rows_residual: torch.Tensor | None = None
    step: int = 0
    """Global inner steps committed: the place in the cosine."""
    changes: tuple[Change, ...] = ()
    """What people changed while it ran, in order; `changes.changed` makes the job in force of them."""
    heard: int = 0
    """Changes that were asked for and dealt with: made, or refused on record."""
    moves: tuple[Move, ...] = ()
    """The last rounds' steps as they travel. In memory only: after a resume silos get the whole vectors."""
    fingerprint: str = ""
    """Of the body, where it was taken as the body was made; in memory only."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, those that are there."""
        named = {
            "body": self.body,
            "rows": self.rows,
            "body_momentum": self.body_momentum,
            "rows_momentum": self.rows_momentum,
            "body_residual": self.body_residual,
            "rows_residual": self.rows_residual,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def fresh_state(job: Job, method: Method, cards: dict[str, SiloCard]) -> RunState:
    """The state before the first round: theta_0, phi_0 and psi_0 (`silo.fresh`)."""
    body = rows = None
    if method.share_body:
        body = fresh_body(job)
    if method.share_rows != "none":
        rows = fresh_rows(job, shared_vocabulary(cards))
    silos = {name: SiloRecord(position=dict.fromkeys(sources, 0)) for name, sources in silos_of(job).items()}
    return RunState(0, silos, body, rows)


def corpora_of(cards: Mapping[str, SiloCard]) -> dict[str, str]:
    """Fingerprint of each source's prepared tokens."""
    return {source: fingerprint for card in cards.values() for source, fingerprint in card.fingerprints.items()}


def shared_vocabulary(cards: dict[str, SiloCard]) -> int:
    """V, on which all silos that share rows must agree.

    Raises:
        SiloError: they do not.
    """
    sizes = {card.silo: card.global_vocabulary_size for card in cards.values()}
    if len(set(sizes.values())) > 1:
        raise SiloError(
            f"the silos were prepared with different global vocabularies: {sizes}; run `dept-ray prepare` again"
        )
    return next(iter(sizes.values()))


def shared_body(state: RunState, holds: int) -> np.ndarray | Moves | None:
    """The body for one who holds that of a round: the steps since, where they are known, else all of it."""
    if state.body is None:
        return None
    steps = _steps_since(state, holds, "body")
    return state.body.numpy() if steps is None else Moves(tuple(state.body.shape), holds, steps)


def shared_rows(
    state: RunState, cards: Mapping[str, SiloCard], holds: Mapping[str, int]
) -> dict[str, np.ndarray | Moves | None]:
    """As `shared_body`, by silo, of the rows that it owns; one object for those who own all and hold the same."""
    if state.rows is None:
        return dict.fromkeys(cards)
    owned = {name: card.rows_of(len(state.rows)) for name, card in cards.items()}
    everything = {
        round: _rows_since(state, slice(None), round)
        for round in {holds[name] for name, mine in owned.items() if isinstance(mine, slice)}
    }
    return {
        name: everything[holds[name]] if isinstance(mine, slice) else _rows_since(state, mine, holds[name])
        for name, mine in owned.items()
    }


def _rows_since(state: RunState, mine: np.ndarray | slice, holds: int) -> np.ndarray | Moves:
    """Some of the rows for one who holds those of a round."""
    assert state.rows is not None
    steps = _steps_since(state, holds, "rows")
    if steps is None:
        return state.rows[mine].numpy()
    num_rows = len(state.rows) if isinstance(mine, slice) else len(mine)
    return Moves((num_rows, state.rows.shape[1]), holds, tuple(step.rows(mine) for step in steps))


def _steps_since(state: RunState, holds: int, what: str) -> tuple[Coded, ...] | None:
    """The coded steps from the vectors of a round to the present ones; None: not all are known."""
    if holds == state.round and holds >= 0:
        return ()
    steps = tuple(getattr(move, what) for move in state.moves if move.base >= holds)
    return steps if holds >= 0 and len(steps) == state.round - holds else None
