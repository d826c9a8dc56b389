"""All that crosses the network: plain dataclasses of numbers, names and flat numpy arrays.

A round is one `RoundOrder` to each chosen silo and one `SiloUpdate` back. `SiloCard` introduces a silo;
`SiloStatus` is what it says of itself while it trains. Nothing else is sent. Under SPEC the fields `rows` are None
in both directions: no row of an embedding is ever in a message.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dept_ray.codec import Coded, Moves, finite_norm


@dataclass(frozen=True)
class Score:
    """Validation figures of one source; sums in nats, divided once where they are read.

    The whole validation split is scored, so `text_bytes` is exact and bits per byte compare across vocabularies.
    """

    nats: float
    """Sum of the cross-entropies of all predicted tokens."""
    tokens: int
    """Predicted tokens."""
    text_bytes: int
    """UTF-8 bytes of the text that those tokens spell."""
    unigram_nats: float
    """The same sum under the smoothed unigram model of the source's training tokens."""


@dataclass(frozen=True)
class SiloCard:
    """How a silo introduces itself. Sizes always; row ids, and token frequencies, only where rows are shared."""

    silo: str
    sources: tuple[str, ...]
    vocabulary_size: int
    train_tokens: dict[str, int]
    """Training tokens per source that it trains on."""
    owned_rows: np.ndarray | None = None
    """Sorted global ids (int64) of the rows this silo owns, or None where it shares none."""
    global_vocabulary_size: int = 0
    """Rows of the global vocabulary, 0 where there is none."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the prepared tokens of each source: a resumed run must meet the same."""
    hardware: str = ""
    """Device, threads and precision, to be printed."""
    row_uses: np.ndarray | None = None
    """(V_k,) fp64: of its training tokens, the share that each row is; None: nobody asks (`outer.row_weights`)."""

    def rows_of(self, num_rows: int) -> np.ndarray | slice:
        """Which of the `num_rows` shared rows (`RunState.rows`) it owns: its token rows, then all positions."""
        if self.owned_rows is None or len(self.owned_rows) == self.global_vocabulary_size:
            return slice(None)
        return np.concatenate([self.owned_rows, np.arange(self.global_vocabulary_size, num_rows)])


@dataclass(frozen=True)
class RoundOrder:
    """What a silo is asked to do: go from a snapshot, take the shared parts, train (or only score), answer.

    `(run, round, life, attempt)` is the fence: an answer that does not carry it back is refused.
    """

    run: str
    silo: str
    round: int
    attempt: int
    after: str | None
    """The snapshot of this silo that the last round names, which may be on its way to disk; None: start fresh."""
    position: dict[str, int]
    """Blocks already trained per source, as committed."""
    first_step: int
    """Global inner step at which this round begins: the place in the cosine."""
    steps: int
    """Inner steps to train; 0 only scores."""
    score: bool
    """Whether to score validation before training."""
    life: int = 0
    """How often the run was taken up again: an order of a coordinator that died is none."""
    keep: tuple[str, ...] = ()
    """Snapshots of this silo that a kept round names: never to be pruned."""
    lr: float = 0.0
    """Peak of the cosine."""
    total_steps: int = 1
    """Length of the cosine, in global inner steps."""
    frozen_steps: int = 0
    """First steps of this round in which the body stands still (a newcomer trains its embedding alone)."""
    donors: dict[str, str] = field(default_factory=dict)
    """Of a newcomer that lives where they live: the snapshots, by silo, whose rows its own begin from."""
    donors_way: str = ""
    """How (`silo.warmstart`)."""
    ahead: int = 0
    """First steps of this round that go from where its snapshot stands, as they were, or could have been, made before
    this order came; what they moved is then laid onto the shared parts, and the rest goes on from there."""
    fingerprint: str = ""
    """Digest of the shared body; the silo checks what arrived against it."""
    codec: str = "fp32"
    """Of the deltas to be sent back (`dept_ray.codec`)."""
    body: np.ndarray | Moves | None = None
    """Flat fp32 vector of the shared body, or how to come to it from the one held; None where bodies stay home."""
    rows: np.ndarray | Moves | None = None
    """fp32 (V_k + L, D): the shared token rows this silo owns, then the positions; None where embeddings stay home."""
    whole: "Callable[[RoundOrder], RoundOrder] | None" = field(default=None, compare=False, repr=False)
    """Makes of this order, which may say how to go on from what a silo held, one for who holds nothing any more.
    Known to who gives the order alone: it does not travel."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "whole": None}

    @property
    def fence(self) -> tuple[int, int]:
        """Its round and attempt, which grow from order to order."""
        return self.round, self.attempt

    def without_arrays(self) -> "RoundOrder":
        """The order alone; arrays travel beside it."""
        return replace(self, body=None, rows=None, whole=None)

    @property
    def from_nothing(self) -> "RoundOrder | None":
        """The order that one who holds nothing can obey; None: it is not known here."""
        if not any(isinstance(vector, Moves) for vector in (self.body, self.rows)):
            return self
        return self.whole(self) if self.whole is not None else None


Delta = np.ndarray | Coded
"""fp32, or as it was coded."""


@dataclass(frozen=True)
class Held:
    """A delta that lies where it arrived, until it is looked at: however many there are, memory is for some."""

    fetch: Callable[[], Delta]
    """Only to be read, and not to be kept."""

    @cached_property
    def norm(self) -> float:
        """L2; nan where a value is not finite. Measured when it is first asked for."""
        return finite_norm(self.fetch())


def norm_found(vector: Delta | Held) -> float:
    """L2 of a delta; nan where a value is not finite."""
    return vector.norm if isinstance(vector, Held) else finite_norm(vector)


def fetched(vector: Delta | Held) -> Delta:
    """The delta itself. Only to be read, and not to be kept."""
    return vector.fetch() if isinstance(vector, Held) else vector


@dataclass(frozen=True)
class SiloUpdate:
    """What a silo answers: how far it trained, where it stands, and the deltas (local minus global, equation 1)."""

    run: str
    silo: str
    round: int
    attempt: int
    fingerprint: str
    """Of the body that the silo started from."""
    steps: int
    """Inner steps really made."""
    tokens: int
    """Tokens really trained this round: the weight w_k (equation 4)."""
    position: dict[str, int]
    snapshot: str | None
    """Name of the snapshot written before this answer; None where the order only scored."""
    loss: float
    """Mean training cross-entropy over the round, nats per token; nan where nothing was trained."""
    life: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    """Validation per source, measured before training; empty where not asked."""
    epochs: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by what was done: load, score, train, code, save; its pool adds send (on the way, both ways) and
    wait (for the round's last answer). Of one who made steps ahead also ahead: those before its order came, which are
    in none of the others."""
    flops: float = 0.0
    """Floating point operations that its steps needed (`silo.flops`)."""
    peak_flops: float = 0.0
    """FLOP/s that its devices can do at most; 0: not known."""
    norms: dict[str, list[float]] = field(default_factory=dict)
    """How large its parameters and activations were at some steps (`silo.norms`)."""
    body_norm: float = 0.0
    """L2 norm of the body's delta."""
    lost: str = ""
    """Why the process that was asked first is gone, where the silo was made anew and asked again; its pool's word."""
    body: Delta | Held | None = None
    rows: Delta | Held | None = None

    def delta(self, what: str) -> Delta | None:
        """The delta of the `body`, or of the `rows`; None where it stays home. Only to be read, and not to be kept."""
        vector = getattr(self, what)
        return None if vector is None else fetched(vector)

    def without_arrays(self) -> "SiloUpdate":
        """The answer alone; arrays travel beside it."""
        return replace(self, body=None, rows=None)


@dataclass(frozen=True)
class SiloStatus:
    """What a silo says of itself at any moment; made without touching the training thread."""

    silo: str
    doing: str = "waiting"
    """waiting, loading, scoring, compiling, training, saving or going ahead."""
    round: int = -1
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    """Latest mean training loss of its round that was read, nats per token; nan: none was yet."""
    tokens_per_s: float = 0.0
    node: str = ""
    """Ray's id of the node that it is on; empty in process, or while it has no place."""
    holds: int = -1
    """The round whose shared vectors it has in memory, and can be told the steps from; -1: none."""
    pid: int = 0
    """Its process, for an operator who wants to look, or to kill."""

    @property
    def trains(self) -> bool:
        """Whether it makes steps, of a round that was ordered or ahead of one."""
        return self.doing in ("training", "going ahead")


@dataclass(frozen=True)
class SiloSpec:
    """What a silo is, told once when it is made: its sources and the facts of the method that concern it."""

    silo: str
    sources: tuple[str, ...]
    vocabulary: str
    """global, trimmed or own."""
    share_body: bool
    share_rows: bool
    """Whether token rows and positions travel; if not, they never leave the silo."""
    reset_embedding: bool
    """Draw the token embedding anew at the start of each round (ACT)."""
    threads: int = 1
    """CPU threads of each rank."""
    compile: bool = False
    """Whether forward and loss are compiled."""
    gpu: bool = False
    """Whether it trains on a GPU: where resources.num_gpus > 0."""
    gpu_part: float = 1.0
    """Of its GPU's memory that is its own: below 1 where silos share one."""
    ranks: int = 1
    """Processes that train it together."""
    shard: str = "auto"
    """What is cut among them: auto, never (nothing), moments or all."""
    held_out: tuple[str, ...] = ()
    """Sources that it only scores."""


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself at any moment."""

    run: str
    phase: str = "starting"
    """starting, training, paused, finished, stopped or failed; `not in progress` where only its folder is known."""
    round: int = 0
    """Rounds committed."""
    rounds: int = 0
    """Rounds in all."""
    error: str = ""
    """Why it failed."""
    silos: dict[str, SiloStatus] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
    num_records: int = 0
    """Records so far; ask for the new ones by number."""
    pid: int = 0
    """The coordinator's process; 0 where none is running."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase not in ("starting", "training", "paused")


Change = dict[str, Any]
"""What people ask the coordinator to change, one of:
{"set": key, "to": value}, {"add": source as plain values}, {"drop": name}, {"return": name}."""
