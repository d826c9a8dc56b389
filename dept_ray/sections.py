"""Every knob of a run by section, with its unit, its default and the reason for it: the tables of the files in `jobs/`.

`config.Job` puts them together. Each section refuses here what is wrong in itself.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dept_ray.codec import CodecName

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    """`[model]`: the transformer. Defaults are the paper's 12 blocks (METHOD.md section 3)."""

    arch: Literal["gpt2", "llama"] = "gpt2"
    """gpt2: learned positions, LayerNorm, GELU, biases. llama: RoPE, RMSNorm, SwiGLU. Both export to Hugging Face."""
    layers: Positive = 12
    width: Positive = 768
    heads: Positive = 12
    kv_heads: Positive | None = None
    """Heads of keys and values, each for heads / kv_heads of the queries (llama alone); None: `heads`."""
    mlp_width: Positive | None = None
    """Hidden width of the MLP; None: 4 * width for gpt2, 8/3 * width rounded up to 64 for llama (equal parameters)."""
    positions: Positive | None = None
    """L, the length of the learned position table; None: `inner.context`."""
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    """What a norm adds under its root; None: 1e-5 for gpt2, 1e-6 for llama."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the angles by which rotary positions turn (llama alone)."""

    @property
    def hidden(self) -> int:
        """The MLP's hidden width in force."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.width if self.arch == "gpt2" else -(-8 * self.width // 3 // 64) * 64

    @property
    def epsilon(self) -> float:
        """What a norm adds, in force."""
        return self.norm_eps or {"gpt2": 1e-5, "llama": 1e-6}[self.arch]

    @property
    def head_groups(self) -> tuple[int, int, int]:
        """Heads of queries, of keys and of values, as one product makes them one after the other."""
        shared = self.kv_heads or self.heads
        return self.heads, shared, shared

    @property
    def in_force(self) -> dict[str, Any]:
        """By key, what is computed with, whether it was said or left open; but for the positions."""
        said = {"mlp_width": self.hidden, "kv_heads": self.head_groups[1], "norm_eps": self.epsilon}
        return {**self.model_dump(), **said}

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSection":
        if self.width % self.heads:
            raise ValueError(f"model.width = {self.width} is not a multiple of model.heads = {self.heads}")
        if self.arch == "llama" and (self.width // self.heads) % 2:
            each = self.width // self.heads
            raise ValueError(f"model.width / model.heads = {each} must be even for rotary positions")
        if self.heads % self.head_groups[1]:
            raise ValueError(f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}")
        return self

    @model_validator(mode="after")
    def _has_what_is_set(self) -> "ModelSection":
        plain = {"kv_heads": (None, self.heads), "rope_theta": (10_000.0,)} if self.arch == "gpt2" else {}
        for key, values in plain.items():
            if (value := getattr(self, key)) not in values:
                raise ValueError(f'model.{key} = {value:g}: model.arch = "gpt2" knows no such thing; remove it')
        return self


class TokenizerSection(Section):
    """`[tokenizer]`: one setting for the global tokenizer, or for each source's own one."""

    kind: Literal["bpe", "unigram", "file", "hub"] = "bpe"
    """bpe: byte-level BPE. unigram: as SPEC-OPT in the paper. file: an existing tokenizer.json. hub: by name."""
    vocab_size: Annotated[int, Field(ge=258)] = 50_257
    """Rows, the end-of-text token included. Paper: 50,257 (Pile, SPEC-OPT), 250,112 (mC4)."""
    name: str | None = None
    """Path (kind = file) or Hub name (kind = hub)."""
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.3
    """How a global tokenizer's sample is shared among sources: p_k proportional to bytes_k ** temperature."""
    sample_bytes: Positive = 50_000_000
    """Text that a tokenizer is trained on, in bytes (over all sources for a global one, per source for an own one)."""
    vocabulary: Literal["global", "trimmed", "own"] | None = None
    """Overrides the method's vocabulary, for `isolated` with own tokenizers; None: what the method says."""
    global_vocab_size: Positive | None = None
    """|V| of the global vocabulary that `dept-ray plan` compares own tokenizers with; paper: as `vocab_size` above."""

    @model_validator(mode="after")
    def _existing_needs_name(self) -> "TokenizerSection":
        if self.kind in ("file", "hub") and not self.name:
            raise ValueError(f'tokenizer.kind = "{self.kind}" needs tokenizer.name, the path or Hub name to load')
        return self


class Resources(Section):
    """`[resources]`, or `resources = {...}` of one source: what Ray holds for a silo."""

    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per silo; fractions share one."""
    num_cpus: Annotated[float, Field(ge=0)] = 0
    """Logical CPUs that Ray sets aside per silo. Keep 0 on a GPU: silos that hold every CPU starve its tasks."""
    labels: dict[str, str] = {}
    """Node labels that place the silo, such as region = "eu"."""
    ranks: Positive | None = None
    """Processes that train a silo together, on one node, each with an equal share of every batch, of num_gpus, num_cpus
    and inner.threads. None: one for each whole GPU, one on a CPU. What each holds is `shard`."""
    shard: Literal["auto", "never", "moments", "all"] = "auto"
    """What is cut among the ranks. never: each has all, 16 bytes a parameter. moments: each keeps and steps its part of
    the optimizer's moments (ZeRO 1): 8 + 8 / ranks, at no loss of speed. all: weights and gradient too (FSDP): 16 /
    ranks, while each block travels three times a micro-batch. Files are the same. auto: the first of these that fills a
    GPU three quarters at most without its activations; never on a CPU, nor with Muon, which needs whole matrices."""

    @property
    def processes(self) -> int:
        """The ranks in force."""
        return self.ranks or max(1, int(self.num_gpus))

    @model_validator(mode="after")
    def _whole_gpus(self) -> "Resources":
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"resources.num_gpus = {self.num_gpus:g}: above 1 only whole GPUs can be held")
        if self.num_gpus and self.processes != max(1, self.num_gpus):
            raise ValueError(
                f"resources.num_gpus = {self.num_gpus:g} and resources.ranks = {self.ranks}: each rank trains on one "
                "GPU; make them equal, or leave ranks out"
            )
        return self


class InnerSection(Section):
    """`[inner]`: AdamW inside a silo, between two messages (METHOD.md section 3)."""

    local_steps: Positive = 500
    """N_local: optimizer steps between two messages."""
    batch_size: Positive = 256
    """Sequences per optimizer step."""
    micro_batch: Positive | None = None
    """Sequences per forward pass; gradients accumulate to `batch_size`. None: all at once on a CPU, on a GPU as many as
    it has room for (found when the silo is made, and told)."""
    context: Positive = 2048
    """Tokens per sequence."""
    lr: Annotated[float, Field(gt=0)] = 6e-4
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Linear warm-up, once, at the start of the run."""
    lr_floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine over all rounds ends at this fraction of the peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled; matrices only, never biases, norms or embeddings."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: on the body's matrices, its updates scaled to the root mean square of AdamW's; AdamW for all else. Some
    matrix products more a step, one moment of the matrices instead of two."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Its moments at the start of a round, where the body is averaged. Bodies that stay home always keep theirs."""
    ahead_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of a round that a silo makes before its order comes, from where it stands: while its last answer
    travels and the outer step is made, which reaches these steps a round late. At most `local_steps`; as few as the
    line asks for, for they cost some loss. 0: it waits. Each silo holds two more copies of what is shared, and its
    snapshots one."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm at most."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matrix products, by autocast; master weights are fp32 always. auto: bf16 where the processor has it."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile of forward and loss. auto: where the run is long enough to earn the compilation back."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: a third more time, much less memory."""
    threads: Positive | None = None
    """CPU threads per silo; None: the machine's cores shared among the silos that train at once."""
    norms_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two measurements of the L2 norms of parameters and activations (`silo.norms`); each costs one more
    forward pass. 0: never, at no cost."""


class OuterSection(Section):
    """`[outer]`: the coordinator's step on the mean delta (METHOD.md equation 2)."""

    preset: Literal["average", "nesterov"] = "average"
    """average: (1.0, 0), the paper. nesterov: (0.7, 0.9), DiLoCo; hurts in runs of few rounds."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """eta; None: the preset's. Where tables stay home deltas are all but orthogonal, so their mean is sqrt(silos) times
    shorter than one: an eta of that size makes a body worth more to build upon, and a little less as it stands."""
    momentum: Fraction | None = None
    """mu; None: the preset's."""
    rows_lr: Annotated[float, Field(gt=0)] = 1.0
    """eta of embedding rows and positions (equation 3)."""
    rows_momentum: Fraction = 0.0
    """mu of embedding rows and positions. 0: the plain masked mean."""
    row_weights: Literal["tokens", "uses"] = "tokens"
    """What a silo's token row counts for in the mean of its owners. tokens: what its body does, the paper. uses: that,
    times how often its text has the token. AdamW moves every row by steps of one size, also those that a source never
    uses and only pushes away: seven such silos outvote the one that learns what the token means. The coordinator is
    told each silo's token frequencies."""

    @property
    def eta(self) -> float:
        return self.lr if self.lr is not None else {"average": 1.0, "nesterov": 0.7}[self.preset]

    @property
    def mu(self) -> float:
        return self.momentum if self.momentum is not None else {"average": 0.0, "nesterov": 0.9}[self.preset]


class WireSection(Section):
    """`[wire]`: what travels between coordinator and silos."""

    codec: CodecName = "fp32"
    """Of deltas on their way up and steps on their way down: 32, 16, 8.25, 4.25 or some 3.7 bits a value. What rounding
    takes is made up for later (error feedback). int4-zstd decodes to int4's values from an eighth fewer bytes, for a
    second of CPU per 300 MB or so: for lines slower than 1 Gbit/s. All but fp32 keep one more copy of the shared
    vectors in each silo."""


class RoundsSection(Section):
    """`[rounds]`: how many, of whom, and how often to look."""

    total: Positive = 10
    """T."""
    choose: Positive | None = None
    """|S_t|: silos drawn per round; None: all."""
    score_every: Annotated[int, Field(ge=0)] = 1
    """Rounds between validations; 0: only at the end."""
    keep: Positive = 2
    """Committed rounds kept on disk."""


class FaultsSection(Section):
    """`[faults]`: what becomes of silos that are lost, late or lie, and of a round that not all answer."""

    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the chosen silos that must answer, or the round is tried again."""
    attempts: Positive = 3
    """Tries of a round before the run ends with QuorumLost."""
    failures: Positive = 3
    """Failures in a row after which a silo is set aside, until someone lets it return."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds the silos may take to be placed and opened; the run starts with those that are. The ranks of one silo
    wait no longer for each other."""
    patience_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds a round waits, once, for a silo that is being made anew; then it starts without the silo."""
    deadline_mads: Annotated[float, Field(ge=0)] = 6.0
    """k: a round's deadline is median + k * MAD of the silos' past seconds, between floor and cap."""
    deadline_floor_s: Annotated[float, Field(gt=0)] = 120.0
    """No deadline is shorter."""
    deadline_cap_s: Annotated[float, Field(gt=0)] = 86_400.0
    """No deadline is longer; the first round has this one."""
    grace_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds a late silo has to hand in what it trained; after that it is given up and made anew."""
    norm_limit: Annotated[float, Field(gt=1)] = 3.0
    """A delta larger than this many times the round's median norm does not count as it is. Honest ones of one round
    were seen to differ by a quarter: AdamW's steps are of one size."""
    norm_policy: Literal["refuse", "clip"] = "refuse"
    """What becomes of it: left out, or scaled down to the median. A liar who is scaled still does harm."""
    newcomer_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of a silo that joined a run in which it trains its embedding alone, with the body frozen."""
    newcomer_rows: Literal["random", "overlap", "ofa", "tokenadapt"] = "random"
    """How the rows of a silo that joined begin where embeddings stay home: drawn, or (as `init.embedding`) from those
    of the silos with the same `storage`, read there and sent nowhere. A silo that lives elsewhere is never read."""

    @model_validator(mode="after")
    def _in_order(self) -> "FaultsSection":
        if self.deadline_floor_s > self.deadline_cap_s:
            raise ValueError(
                f"faults.deadline_floor_s = {self.deadline_floor_s:g} is above faults.deadline_cap_s = "
                f"{self.deadline_cap_s:g}: lower the floor or raise the cap"
            )
        return self


class RegionsSection(Section):
    """`[regions]`: silos behind the walls of other regions, each on a Ray cluster of its own."""

    mailbox: str | None = None
    """Where orders and updates are files: s3://bucket/prefix, gs://bucket/prefix, or a folder that all see, of this
    job alone. Each silo lives where a `dept-ray region` bears its labels. None: all silos are on one cluster."""
    look_every_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two looks into the mailbox. On a bucket each costs a few requests per region."""
    silent_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a sign of life after which a region is cut off: its silos are not there until it is back."""

    @model_validator(mode="after")
    def _looks_before_it_despairs(self) -> "RegionsSection":
        if self.silent_s <= 3 * self.look_every_s:
            raise ValueError(
                f"regions.silent_s = {self.silent_s:g} must be more than three times regions.look_every_s = "
                f"{self.look_every_s:g}: raise the one or lower the other"
            )
        return self


class MixtureSection(Section):
    """`[mixture]`: how one silo draws from all sources (STD and ACT)."""

    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    """tau: p_k proportional to n_k ** tau. 0 uniform, 1 proportional to size."""


class InitSection(Section):
    """`[init]`: another run, or a Hugging Face checkpoint, that this one goes on from (METHOD.md section 4)."""

    run: str | None = None
    """A run's folder, or its name under `folder`; None: none. What is taken is copied into the new run."""
    checkpoint: str | None = None
    """A Hugging Face checkpoint of a GPT-2 or a Llama (config.json, safetensors and, for its rows, tokenizer.json): a
    folder, or its name on the Hub. Its shapes and constants must be those of [model]; what is taken is copied, as
    of a run."""
    round: Annotated[int, Field(gt=0)] | None = None
    """A run's committed round; None: the last."""
    silo: Name | None = None
    """Whose body, where bodies stay home and there are several (`isolated`)."""
    embedding: Literal["random", "own", "overlap", "ofa", "tokenadapt"] = "random"
    """random: drawn from the seed, like any other. own: that of the run, which must have a global vocabulary, or of the
    checkpoint; with the same tokenizer as this job. overlap: rows of the tokens that its embeddings have, of all silos
    of a run, and what is in none drawn like them; under SPEC this takes rows out of the silos, whose storage must be
    seen. ofa: as overlap, but what is in none is like the tokens that the new text uses alike. tokenadapt: it is the
    mean of the parts that the old tokenizers cut it into (`silo.warmstart`)."""
    frozen_body: bool = False
    """Train the embedding alone."""
    fingerprint: str | None = None
    """Digest of what is taken; filled in when the run begins. Where it is set, nothing else is taken."""

    @property
    def origin(self) -> str | None:
        """The run or the checkpoint; None: all is drawn."""
        return self.run or self.checkpoint

    @property
    def told(self) -> str:
        """For messages: the key that names the origin, and its value."""
        return f"init.{'run' if self.run else 'checkpoint'} = {self.origin!r}"

    @model_validator(mode="after")
    def _has_one_origin(self) -> "InitSection":
        if self.origin is None and self.model_dump(exclude_defaults=True):
            told = "nothing is taken from another run without init.run, or from a model without init.checkpoint"
            raise ValueError(f"init: {told}: name it, or remove the section")
        for key in ("run", "round", "silo") if self.checkpoint else ():
            if getattr(self, key) is not None:
                raise ValueError(f"init.{key} = {getattr(self, key)!r}: none for a checkpoint; remove either")
        return self
