"""A job's costs as plain values: what a `Plan` says of silos, messages, memory and text (METHOD.md section 5).

It knows no job: `study.plan` works the figures out, `study.plan_table` prints them. Here is only what follows from
figures alone, such as how many times less travels than in data-parallel training.
"""

from dataclasses import dataclass
from statistics import fmean

from dept_ray.rounds.methods import Method

FP32_BYTES = 4


@dataclass(frozen=True)
class Values:
    """Counts of fp32 values by part: of a model, or of a message."""

    body: int
    rows: int
    """Token embedding, tied with the head."""
    positions: int

    @property
    def total(self) -> int:
        return self.body + self.rows + self.positions


@dataclass(frozen=True)
class Memory:
    """Bytes that a silo holds while it trains, or each of its ranks: an estimate, without the allocator's slack."""

    weights: int
    """fp32."""
    gradients: int
    """fp32."""
    moments: int
    """Both of AdamW; of Muon's matrices one; fp32. Of a rank its part, where `resources.shard` cuts them."""
    casts: int
    """The bf16 copy of the weights that autocast keeps; 0 in fp32. Where all is cut: of two blocks, as they compute."""
    activations: int
    """See `plan.activation_bytes`."""
    activations_otherwise: int
    """The same under the other setting of `inner.checkpoint_activations`; not in the total."""
    loss: int
    """Of one chunk of rows, and the head's gradient on its way; see `plan.loss_bytes`."""
    loss_rows: int
    """Tokens in such a chunk."""
    checkpointed: bool = False
    """`inner.checkpoint_activations`."""
    ranks: int = 1
    """That the silo has, each on a GPU of its own or in a process of its own."""
    shard: str = "never"
    """What is cut among them, as `resources.shard`; auto is counted as never: no GPU is at hand to be filled."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.casts + self.activations + self.loss


@dataclass(frozen=True)
class SourcePlan:
    """How often a source is read."""

    name: str
    tokens: int | None
    """Training tokens there are; None: nobody said."""
    trained: float | None
    """Training tokens of the whole run that come from here; None: a mixture whose shares hang on unknown `tokens`."""

    @property
    def epochs(self) -> float | None:
        return None if self.tokens is None or self.trained is None else self.trained / self.tokens


@dataclass(frozen=True)
class SiloPlan:
    """One silo: its model, its messages, its memory and its text."""

    name: str
    sources: tuple[SourcePlan, ...]
    vocabulary_size: int
    """|V_k|."""
    vocabulary_from: str
    """Where |V_k| comes from: prepared data, the source's `vocab_size`, or the tokenizer's `vocab_size`."""
    parameters: Values
    """M_k by part."""
    sent: Values
    """What a round moves to this silo, and again what it moves back."""
    message_bytes: int
    """The same on the wire, as `wire.codec` codes it."""
    round_tokens: int
    """Trained in a round that the silo is chosen for."""
    total_tokens: float
    """Trained in the whole run; expected, where not all silos are chosen each round."""
    memory: Memory

    @property
    def down_bytes(self) -> int:
        return self.message_bytes

    @property
    def up_bytes(self) -> int:
        return self.message_bytes


@dataclass(frozen=True)
class DataParallel:
    """The same model trained with a gradient exchanged at each step, and one global vocabulary."""

    vocabulary_size: int
    parameters: Values

    @property
    def step_values(self) -> int:
        """One way, as the paper counts: M."""
        return self.parameters.total

    @property
    def step_bytes(self) -> int:
        """Down and up, per worker."""
        return 2 * self.step_values * FP32_BYTES


@dataclass(frozen=True)
class Standard:
    """The two STD runs to hold the job against: as many steps, and as many tokens."""

    step_matched_steps: int
    step_matched_tokens: int
    token_matched_steps: int
    token_matched_tokens: int


@dataclass(frozen=True)
class Plan:
    """A job's costs. Per-silo figures are means where silos differ."""

    job: str
    method: Method
    codec: str
    """Of what travels."""
    width: int
    rounds: int
    local_steps: int
    silos: tuple[SiloPlan, ...]
    silos_per_round: int
    standard: Standard
    data_parallel: DataParallel | None
    """None where no global vocabulary is declared."""
    notes: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        """Of one silo that is always chosen: T * N_local."""
        return self.rounds * self.local_steps

    @property
    def total_tokens(self) -> int:
        """Of all silos together."""
        return self.silos_per_round * self.rounds * self.silos[0].round_tokens

    @property
    def step_values(self) -> float:
        """Per silo and inner step, one way, as the paper counts."""
        return fmean(silo.sent.total for silo in self.silos) / self.local_steps

    @property
    def step_bytes(self) -> float:
        """Per silo and inner step, down and up, as it is coded."""
        return 2 * fmean(silo.message_bytes for silo in self.silos) / self.local_steps

    @property
    def round_bytes_down(self) -> float:
        """Of all chosen silos together; expected, where silos differ and not all are chosen."""
        return self.silos_per_round * fmean(silo.down_bytes for silo in self.silos)

    @property
    def round_bytes_up(self) -> float:
        """As `round_bytes_down`."""
        return self.silos_per_round * fmean(silo.up_bytes for silo in self.silos)

    @property
    def reduction(self) -> float | None:
        """How many times less travels than in data-parallel training; None: nothing travels, or nothing to compare."""
        if self.data_parallel is None or not self.step_values:
            return None
        return reduction(self.data_parallel.step_values, fmean(s.sent.total for s in self.silos), self.local_steps)

    @property
    def byte_reduction(self) -> float | None:
        """The same in bytes: data-parallel training in fp32 over this job as it is coded."""
        if self.data_parallel is None or not self.step_bytes:
            return None
        return self.data_parallel.step_bytes / self.step_bytes

    @property
    def embedding_saved(self) -> float | None:
        """Embedding parameters per silo that the global vocabulary would have added: (|V| - mean |V_k|) D."""
        if self.data_parallel is None:
            return None
        return (self.data_parallel.vocabulary_size - fmean(s.vocabulary_size for s in self.silos)) * self.width

    @property
    def embedding_saved_share(self) -> float | None:
        """`embedding_saved` as a share of the global token embedding."""
        if self.data_parallel is None or self.embedding_saved is None:
            return None
        return self.embedding_saved / self.data_parallel.parameters.rows


def reduction(global_values: float, sent_values: float, local_steps: int) -> float:
    """M / (sent / N_local), the paper's factor.

    >>> round(reduction(1.71e9, 1.71e9 - 512.2e6, 500))
    714
    """
    return global_values / (sent_values / local_steps)
