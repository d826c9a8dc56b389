"""The outer step: equations (1) to (4) of METHOD.md as code, on flat fp32 vectors.

    (1)  g = -sum_k w_k d_k / sum_k w_k                             mean over those who answered
    (2)  m <- mu m + g;  theta <- theta - eta (g + mu m)            Nesterov, in torch's order of operations
    (3)  the same per embedding row, over the silos that own it; a row nobody reported does not move,
         neither in value nor in momentum
    (4)  w_k = tokens that silo k really trained, times its source's weight; of a token's row, where
         `outer.row_weights` says so, times the share of that token in the silo's text

Under a lossy codec the step is rounded as it will be sent, with what was rounded away before added (`dept_ray.codec`).
Sums fold in silo-name order, so the result does not depend on who answered first. Deltas are looked at some at a time
(`messages.Held`), so that memory is for some bodies however many silos there are. GLOB is the case in which every silo
owns every row; there is no other code for it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dept_ray.codec import Coded, decoded, encode
from dept_ray.config import Job
from dept_ray.draws import checksum, fingerprint, fingerprint_of, pieces
from dept_ray.messages import Delta, Held, SiloCard, SiloUpdate, fetched
from dept_ray.rounds.fold import empty, weighted_mean
from dept_ray.rounds.state import Move, RunState


def outer_step(job: Job, state: RunState, updates: Mapping[str, SiloUpdate], cards: Mapping[str, SiloCard]) -> RunState:
    """The state after a round.

    Args:
        state: theta_{t-1} and its company.
        updates: the accepted answers, by silo.
        cards: who owns which rows.

    Returns:
        A new state, one round on; nothing of the old one is changed.
    """
    weights = weights_of(job, updates)
    outer, changed, move = job.outer, dict[str, Any](), dict[str, Coded]()
    if state.body is not None:
        deltas = {k: u.body for k, u in updates.items() if u.body is not None}
        theta, changed["body_momentum"], seen = body_step(
            deltas, weights, state.body, state.body_momentum, outer.eta, outer.mu
        )
        if job.wire.codec != "fp32":
            theta, changed["body_residual"], move["body"] = as_sent(
                job.wire.codec, state.body, theta, state.body_residual
            )
            seen = fingerprint_of(theta.numpy())
        changed |= {"body": theta, "fingerprint": seen}
    if state.rows is not None:
        owners = {k: cards[k].rows_of(len(state.rows)) for k in updates}
        deltas = {k: u.rows for k, u in updates.items() if u.rows is not None}
        shares = {k: weights_of_rows(w, cards[k], len(state.rows)) for k, w in weights.items()}
        mean, reported = mean_over_owners(deltas, owners, shares, tuple(state.rows.shape))
        rows, changed["rows_momentum"] = _masked_nesterov(
            state.rows, -mean, reported, state.rows_momentum, outer.rows_lr, outer.rows_momentum
        )
        if job.wire.codec != "fp32":
            rows, changed["rows_residual"], move["rows"] = as_sent(
                job.wire.codec, state.rows, rows, state.rows_residual, reported
            )
        changed["rows"] = rows
    silos = {k: record.after(updates[k]) if k in updates else record for k, record in state.silos.items()}
    if move:
        changed["moves"] = _worth_keeping(state, Move(state.round, move.get("body"), move.get("rows")))
    return replace(state, round=state.round + 1, step=state.step + job.inner.local_steps, silos=silos, **changed)


def as_sent(
    codec: str,
    before: torch.Tensor,
    wanted: torch.Tensor,
    residual: torch.Tensor | None,
    moved: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Coded]:
    """A step as everybody can make it: the coordinator, too, takes what decodes from the wire.

    Args:
        before, wanted: the vector, or (R, D) rows, and what the outer step makes of it.
        residual: what earlier steps lack.
        moved: (R,) bool; the other rows stand still, and keep their residual. None: all may move.

    Returns:
        The vector after the step, the residual, and the step.
    """
    step = wanted - before
    if residual is not None:
        step += residual
    if moved is not None:
        step[~moved] = 0
    coded, lacks = encode(step.numpy(), codec)
    after = before.clone()
    coded.add_to(after.numpy())
    rest = torch.from_numpy(lacks)
    if moved is not None and residual is not None:
        rest[~moved] = residual[~moved]
    return after, rest, coded


def _worth_keeping(state: RunState, move: Move) -> tuple[Move, ...]:
    """The last moves that together are fewer bytes than what they move: for silos that missed rounds."""
    whole = sum(4 * tensor.numel() for tensor in (state.body, state.rows) if tensor is not None)
    kept, total = [move], move.nbytes
    for earlier in reversed(state.moves):
        total += earlier.nbytes
        if total >= whole:
            break
        kept.insert(0, earlier)
    return tuple(kept)


def weights_of(job: Job, updates: Mapping[str, SiloUpdate]) -> dict[str, float]:
    """w_k / sum w, equation (4), in silo-name order."""
    known = {source.name: source.weight for source in job.sources}
    raw = {name: updates[name].tokens * known.get(name, 1.0) for name in sorted(updates)}
    total = sum(raw.values())
    return {name: w / total for name, w in raw.items()}


def weights_of_rows(weight: float, card: SiloCard, num_rows: int) -> np.ndarray | float:
    """What each row of a silo counts for, (V_k + L,): token rows by their uses, positions by w_k. One: all alike."""
    if card.row_uses is None:
        return weight
    positions = np.ones(num_rows - card.global_vocabulary_size)
    return weight * np.concatenate([card.row_uses, positions])


def mean_over_owners(
    deltas: Mapping[str, Delta | Held],
    owners: Mapping[str, np.ndarray | slice],
    weights: Mapping[str, np.ndarray | float],
    shape: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (3)'s mean: for each row over the silos that own it.

    Args:
        deltas: (V_k, D) by silo.
        owners: which rows of the whole those are.
        weights: w_k, of all its rows or of each (V_k + L,).
        shape: (V, D) of the whole.

    Returns:
        The mean, (V, D) fp32, zero where nobody who counts reported; and the reported rows, (V,) bool.
    """
    total, count = np.zeros(shape, np.float32), np.zeros(shape[0], np.float64)
    for name in sorted(deltas):
        total[owners[name]] += decoded(fetched(deltas[name])) * np.float32(weights[name]).reshape(-1, 1)
        count[owners[name]] += weights[name]
    reported = count > 0
    total[reported] /= count[reported, None].astype(np.float32)
    return torch.from_numpy(total), torch.from_numpy(reported)


def nesterov(
    theta: torch.Tensor, g: torch.Tensor, m: torch.Tensor | None, eta: float, mu: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Equation (2), bit for bit `torch.optim.SGD(lr=eta, momentum=mu, nesterov=True)`.

    Returns:
        New theta and m; m stays None where mu = 0.
    """
    if mu == 0:
        return theta.add(g, alpha=-eta), m
    m = g.clone() if m is None else m.mul(mu).add_(g)
    return theta.add(g.add(m, alpha=mu), alpha=-eta), m


def body_step(
    deltas: Mapping[str, Delta | Held], weights: Mapping[str, float], theta: torch.Tensor, m: torch.Tensor | None,
    eta: float, mu: float,
) -> tuple[torch.Tensor, torch.Tensor | None, str]:  # fmt: skip
    """Equations (1), (2) and (4) on the body in one pass over memory: `nesterov`, to the bit, with g = -mean.

    Args:
        deltas: (n,) by silo.
        weights: w_k.
        theta, m: the body (n,), and its momentum where there is some.

    Returns:
        New theta and m, and theta's fingerprint.
    """
    new_m = None if mu == 0 else empty(theta.shape)
    checksums = dict[int, list[str]]()

    def step(here: slice, g: torch.Tensor, room: torch.Tensor) -> None:
        torch.neg(g, out=g)
        move = g
        if new_m is not None:
            momentum = new_m[here]
            if m is None:
                momentum.copy_(g)
            else:
                torch.mul(m[here], mu, out=momentum).add_(g)
            move = torch.add(g, momentum, alpha=mu, out=room)
        made = torch.add(theta[here], move, alpha=-eta, out=g).numpy()
        checksums[here.start] = [checksum(made[part]) for part in pieces(len(made))]

    after = weighted_mean(deltas, weights, step)
    seen = fingerprint(each for start in sorted(checksums) for each in checksums[start])
    return after, m if mu == 0 else new_m, seen


def _masked_nesterov(
    rows: torch.Tensor, g: torch.Tensor, reported: torch.Tensor, m: torch.Tensor | None, eta: float, mu: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Equation (2) on the reported rows; the others stay as they are."""
    if mu > 0 and m is None:
        m = torch.zeros_like(rows)
    moved, moved_m = nesterov(rows[reported], g[reported], m[reported] if m is not None else None, eta, mu)
    rows = rows.clone()
    rows[reported] = moved
    if m is not None and moved_m is not None:
        m = m.clone()
        m[reported] = moved_m
    return rows, m
