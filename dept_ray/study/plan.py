"""What a job will cost, before it runs: parameters, bytes, memory, tokens (METHOD.md section 5). Pure arithmetic.

It reads no text, starts nothing and needs no GPU: everything follows from the job file and, where data is prepared,
from its sizes. M is the size of the model with the global vocabulary V, M_k of silo k's model with V_k, theta the body:

    per step, one way     M for data-parallel training; what a silo sends / N_local for a method in rounds:
                          GLOB M, TRIM M - (|V| - |V_k|) D, SPEC theta = M - (|V| + L) D
    reduction             M / per step
    embedding saved       (|V| - mean |V_k|) D

The paper counts one direction; a parameter server moves the same down and up, so bytes stand here for both. They are
those of `wire.codec` for a round in which every silo took part in the one before; data-parallel training is in fp32.
"""

from collections.abc import Mapping

from dept_ray.codec import coded_bytes
from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.rounds.methods import Method, method_of, silos_of, silos_per_round
from dept_ray.study.costs import FP32_BYTES, DataParallel, Memory, Plan, SiloPlan, SourcePlan, Standard, Values

MANY_EPOCHS = 4.0
"""Past this, repeated text teaches less and less (METHOD.md section 6)."""
GPU_MICRO_BATCH = 16
"""`inner.micro_batch` on a GPU, at most, where the job leaves it open: a silo takes as many as its GPU has room for."""


def plan(job: Job, vocabulary_sizes: Mapping[str, int] | None = None, tokens: Mapping[str, int] | None = None) -> Plan:
    """What the job will cost.

    Args:
        job: the job.
        vocabulary_sizes: |V_k| by source (or silo) name, from prepared data. Else the source's `vocab_size` (not under
            a global vocabulary), else `tokenizer.vocab_size`: exact for global and own tokenizers, an upper bound
            for trimmed ones.
        tokens: training tokens by source name, from prepared data; else the source's `tokens`.

    Raises:
        ConfigError: a vocabulary's size is nowhere declared, or the declared ones contradict each other.
    """
    method, members = method_of(job), silos_of(job)
    names = {*members, *(name for sources in members.values() for name in sources)}
    vocabulary_sizes = {name: size for name, size in (vocabulary_sizes or {}).items() if name in names}
    tokens = tokens or {}
    chosen = silos_per_round(job)
    round_tokens = job.inner.local_steps * job.inner.batch_size * job.inner.context
    total_tokens = job.rounds.total * round_tokens * chosen / len(members)
    global_size = _global_size(job, method, vocabulary_sizes)
    silos = []
    for name, sources in members.items():
        size, where = _vocabulary_size(job, method, name, sources, vocabulary_sizes, global_size)
        parameters = _parameters(job, size)
        silos.append(
            SiloPlan(
                name=name,
                sources=_readings(job, sources, tokens, total_tokens),
                vocabulary_size=size,
                vocabulary_from=where,
                parameters=parameters,
                sent=(sent := _sent(method, parameters)),
                message_bytes=_message_bytes(job, sent),
                round_tokens=round_tokens,
                total_tokens=total_tokens,
                memory=_memory(_placed(job, name), parameters, size),
            )
        )
    return Plan(
        job=job.name,
        method=method,
        codec=job.wire.codec,
        width=job.model.width,
        rounds=job.rounds.total,
        local_steps=job.inner.local_steps,
        silos=tuple(silos),
        silos_per_round=chosen,
        standard=Standard(
            step_matched_steps=job.total_steps,
            step_matched_tokens=job.rounds.total * round_tokens,
            token_matched_steps=job.total_steps * chosen,
            token_matched_tokens=job.rounds.total * round_tokens * chosen,
        ),
        data_parallel=None if global_size is None else DataParallel(global_size, _parameters(job, global_size)),
        notes=_notes(job, method, silos, global_size),
    )


def activation_bytes(job: Job, micro_batch: int, checkpointed: bool) -> int:
    """Activations of one micro-batch, kept for the backward pass.

    Per token and block, with c bytes a value (bf16 2, fp32 4), width D and MLP width H:
    8 D (fp32 inputs of both norms) + c (6 D + 2 H): both norms' outputs, q, k, v, the attention's output, and the MLP
    before and after its nonlinearity (llama 4 H: gate, its SiLU, up and their product). Attention is flash: no T x T.
    The final norm adds (4 + c) D per token. With `inner.checkpoint_activations`: 4 D per block, plus one block in full.
    """
    model, c = job.model, _value_bytes(job)
    wide = 2 if model.arch == "gpt2" else 4
    block = 8 * model.width + c * (6 * model.width + wide * model.hidden)
    blocks = 4 * model.width * model.layers + block if checkpointed else block * model.layers
    return micro_batch * job.inner.context * (blocks + (4 + c) * model.width)


def loss_bytes(num_rows: int, vocabulary_size: int, width: int) -> int:
    """What the loss of a micro-batch holds at its peak, as silo/loss.py computes it: `num_rows` tokens at a time.

    Per logit of a chunk 8 bytes, whatever the precision: the logit in fp32, and the exponential that its logsumexp is
    summed from (later, in its place, the gradient's cast). Beside them two fp32 (V, D): the head's gradient, which
    grows from chunk to chunk, and the product that is added to it (in the backward pass its scaled copy).
    """
    return 2 * FP32_BYTES * vocabulary_size * (num_rows + width)


def loss_rows(job: Job, num_tokens: int, vocabulary_size: int) -> int:
    """Tokens in one chunk of the loss of `num_tokens`."""
    from dept_ray.silo.loss import chunk_rows

    return min(chunk_rows(vocabulary_size, "cuda" if job.resources.num_gpus else "cpu"), num_tokens)


def _value_bytes(job: Job) -> int:
    """Of a matrix product's result. `auto` counts as bf16 on a GPU; on a CPU as fp32, the larger of what it may be."""
    return 2 if job.inner.precision == "bf16" or (job.inner.precision == "auto" and job.resources.num_gpus) else 4


def _global_size(job: Job, method: Method, prepared: Mapping[str, int]) -> int | None:
    """|V|, or None where nothing says it."""
    declared = job.tokenizer.global_vocab_size
    if method.vocabulary == "own":
        return declared
    if method.vocabulary == "global" and prepared:
        return max(prepared.values())
    if declared is not None and _size_is_known(job) and declared != job.tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.global_vocab_size = {declared}, but the global tokenizer of this job has "
            f"tokenizer.vocab_size = {job.tokenizer.vocab_size}: remove the former, it is for own tokenizers"
        )
    return job.tokenizer.vocab_size if _size_is_known(job) else declared


def _size_is_known(job: Job) -> bool:
    """Whether `tokenizer.vocab_size` says something: of an existing tokenizer, the default would be a guess."""
    return job.tokenizer.kind in ("bpe", "unigram") or "vocab_size" in job.tokenizer.model_fields_set


def _vocabulary_size(
    job: Job, method: Method, silo: str, sources: tuple[str, ...], prepared: Mapping[str, int], global_size: int | None
) -> tuple[int, str]:
    """|V_k| and where it comes from."""
    size, where = None, ""
    if method.vocabulary == "global":
        size, where = global_size, "prepared data" if prepared else "tokenizer.vocab_size"
    elif silo in prepared:
        size, where = prepared[silo], "prepared data"
    elif (declared := job.source(sources[0]).vocab_size) is not None:
        size, where = declared, "sources.vocab_size"
    elif _size_is_known(job):
        size, where = job.tokenizer.vocab_size, "tokenizer.vocab_size"
    if size is None:
        raise ConfigError(
            f'tokenizer.vocab_size: not set, and the size of the existing tokenizer "{job.tokenizer.name}" cannot be '
            f"known without reading it (silo {silo}): set it, or prepare the data first"
        )
    if method.vocabulary == "trimmed" and global_size is not None and size > global_size:
        raise ConfigError(
            f"|V_k| = {size} of {silo} ({where}) is more than tokenizer.vocab_size = {global_size}: a trimmed "
            "vocabulary is a part of the global one; lower the former or raise the latter"
        )
    return size, where


def _parameters(job: Job, vocabulary_size: int) -> Values:
    from dept_ray.silo.model import num_parameters  # torch: seconds, and only a plan that is asked for pays them

    sizes = num_parameters(job.model, job.positions, vocabulary_size)
    return Values(body=sizes.body, rows=sizes.tokens, positions=sizes.positions)


def _sent(method: Method, parameters: Values) -> Values:
    """What of a silo's model travels, each way. The rows a silo has are the rows it owns."""
    rows = method.share_rows != "none"
    return Values(
        body=parameters.body if method.share_body else 0,
        rows=parameters.rows if rows else 0,
        positions=parameters.positions if rows else 0,
    )


def _message_bytes(job: Job, sent: Values) -> int:
    """On the wire: the body as one vector, embedding and positions as rows."""
    width, codec = job.model.width, job.wire.codec
    rows = (sent.rows + sent.positions) // width
    return coded_bytes(codec, (sent.body,)) + coded_bytes(codec, (rows, width))


def _placed(job: Job, silo: str) -> Job:
    """The job as that silo sees it: with its own resources, where its source has some."""
    own = next((source.resources for source in job.sources if source.name == silo), None)
    return job if own is None else job.model_copy(update={"resources": own})


def _memory(job: Job, values: Values, vocabulary_size: int) -> Memory:
    inner, resources = job.inner, job.resources
    share = inner.batch_size // resources.processes
    most = min(GPU_MICRO_BATCH, share) if resources.num_gpus else share
    largest = next(d for d in range(most, 0, -1) if share % d == 0)
    micro_batch = inner.micro_batch or largest
    rows = loss_rows(job, micro_batch * inner.context, vocabulary_size)
    shard = resources.shard if resources.processes > 1 else "never"
    kept = opened = values.total
    block = 0
    if shard == "all":  # the embedding is whole during a pass, and two blocks: one that computes, one that comes
        block = values.body // job.model.layers
        kept, opened = values.total // resources.processes, 2 * block
    embedding = values.total - values.body if shard == "all" else 0
    moments = 2 * values.total - (_matrices(job) if inner.optimizer == "muon" else 0)
    return Memory(
        weights=FP32_BYTES * (kept + embedding),
        gradients=FP32_BYTES * (kept + embedding) + (_value_bytes(job) + FP32_BYTES) * block,  # and of one on its way
        moments=FP32_BYTES * moments // (resources.processes if shard in ("moments", "all") else 1),
        casts=_value_bytes(job) * opened if _value_bytes(job) == 2 or shard == "all" else 0,
        activations=activation_bytes(job, micro_batch, inner.checkpoint_activations),
        activations_otherwise=activation_bytes(job, micro_batch, not inner.checkpoint_activations),
        loss=loss_bytes(rows, vocabulary_size, job.model.width),
        loss_rows=rows,
        checkpointed=inner.checkpoint_activations,
        ranks=resources.processes,
        shard=shard,
    )


def _matrices(job: Job) -> int:
    """Values in the body's matrices."""
    from dept_ray.silo.model import layout_of

    return layout_of(job.model).matrix_size  # pyright: ignore[reportArgumentType] - a frozen section has a hash


def _readings(job: Job, names: tuple[str, ...], tokens: Mapping[str, int], total: float) -> tuple[SourcePlan, ...]:
    """Tokens of each source of a silo that trains on `total` tokens: by p_k = weight_k n_k ** tau in a mixture."""
    sizes = {name: tokens.get(name, job.source(name).tokens) for name in names}
    shares: dict[str, float] = {}
    for name, size in sizes.items():
        if len(names) == 1 or job.mixture.temperature == 0 or size is not None:
            shares[name] = job.source(name).weight * (size or 1) ** job.mixture.temperature
    known = len(shares) == len(names)
    return tuple(
        SourcePlan(name, sizes[name], total * shares[name] / sum(shares.values()) if known else None) for name in names
    )


def _notes(job: Job, method: Method, silos: list[SiloPlan], global_size: int | None) -> tuple[str, ...]:
    """What a reader must know to read the figures rightly, or to train well."""
    notes = []
    if job.inner.warmup_steps >= job.total_steps:
        notes.append(
            f"inner.warmup_steps = {job.inner.warmup_steps:,} of {job.total_steps:,} steps in all: the learning rate "
            f"never goes on from its warm-up; set it to a tenth of them, {max(1, job.total_steps // 10):,}, or less"
        )
    guessed = [silo.name for silo in silos if silo.vocabulary_from == "tokenizer.vocab_size"]
    if method.vocabulary == "trimmed" and guessed:
        notes.append(
            f"|V_k| of {_few(guessed)} is not known yet, and stands at the whole vocabulary, an upper bound: "
            "prepare the data, or set vocab_size of the source"
        )
    if global_size is None:
        notes.append("no comparison with data-parallel training: set tokenizer.global_vocab_size, the |V| it would use")
    readings = [reading for silo in silos for reading in silo.sources]
    unknown = [reading.name for reading in readings if reading.tokens is None]
    if unknown:
        notes.append(f"epochs of {_few(unknown)} are not known: prepare the data, or set tokens of the source")
    repeated = [r.name for r in readings if r.epochs is not None and r.epochs > MANY_EPOCHS]
    if repeated:
        notes.append(f"{_few(repeated)}: read more than {MANY_EPOCHS:.0f} times; repeated text teaches less and less")
    return tuple(notes)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def plan_job(job: Job) -> Plan:
    """`plan` with the sizes of whatever text is prepared already."""
    from dept_ray.text.prepare import prepared_sizes, tokenizer_kind

    vocabulary = method_of(job).vocabulary
    sizes = prepared_sizes(job, tokenizer_kind(vocabulary), vocabulary == "trimmed")
    return plan(job, sizes["vocabulary_sizes"], sizes["tokens"])
