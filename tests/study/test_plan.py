"""The plan's figures are those that a hand works out: what is sent, read and held, and where |V_k| comes from.

The paper's own figures: test_paper_figures.
"""

import io

import pytest
import torch
from rich.console import Console

from dept_ray.config import Job
from dept_ray.console import human
from dept_ray.errors import ConfigError
from dept_ray.jobfile import parse_job
from dept_ray.silo import loss
from dept_ray.silo.hardware import choose_hardware
from dept_ray.study.costs import Plan
from dept_ray.study.plan import GPU_MICRO_BATCH, activation_bytes, loss_bytes, loss_rows, plan
from dept_ray.study.plan_table import headline, render


def printed(costs: Plan) -> str:
    out = io.StringIO()
    Console(width=80, file=out).print(render(costs))
    return out.getvalue()


def tiny(method: str = "spec", sources: list[dict] | None = None, **sections) -> Job:
    """Two silos; D = 4, one block, L = 8, 10 steps of 2 x 8 tokens a round, 3 rounds, |V| = 1,000."""
    sources = sources or [{"name": "a", "vocab_size": 600}, {"name": "b", "vocab_size": 800}]
    values = {
        "name": "tiny",
        "method": method,
        "sources": [{"kind": "installed", "collection": "docs", **source} for source in sources],
        "model": {"layers": 1, "width": 4, "heads": 2},
        "tokenizer": {"vocab_size": 1000},
        "inner": {"local_steps": 10, "batch_size": 2, "context": 8, "precision": "fp32"},
        "rounds": {"total": 3},
    }
    return parse_job({**values, **{name: {**values.get(name, {}), **section} for name, section in sections.items()}})


TINY_BODY = (4 * 12 + 12) + (4 * 4 + 4) + (4 * 16 + 16) + (16 * 4 + 4) + 2 * 8 + 8
"""q, k, v; projection; MLP up; MLP down; two norms; the final norm."""


# Worked by hand.


@pytest.mark.parametrize(
    ("method", "a", "b"),
    [
        ("glob", (TINY_BODY, 4000, 32), (TINY_BODY, 4000, 32)),
        ("trim", (TINY_BODY, 2400, 32), (TINY_BODY, 3200, 32)),
        ("spec", (TINY_BODY, 0, 0), (TINY_BODY, 0, 0)),
        ("spec-opt", (TINY_BODY, 0, 0), (TINY_BODY, 0, 0)),
        ("isolated", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_what_is_sent_by_hand(method, a, b):
    costs = plan(tiny(method))
    assert [(s.sent.body, s.sent.rows, s.sent.positions) for s in costs.silos] == [a, b]
    assert costs.step_values == (sum(a) + sum(b)) / 2 / 10


def test_bytes_go_down_and_up():
    costs = plan(tiny("trim"))
    sent = [TINY_BODY + 2400 + 32, TINY_BODY + 3200 + 32]
    assert [(s.down_bytes, s.up_bytes) for s in costs.silos] == [(4 * n, 4 * n) for n in sent]
    assert costs.round_bytes_down == costs.round_bytes_up == 4 * sum(sent)
    assert costs.step_bytes == pytest.approx(2 * 4 * sum(sent) / 2 / 10)
    assert costs.data_parallel is not None
    assert costs.data_parallel.step_bytes == 2 * 4 * (TINY_BODY + 4000 + 32)
    assert costs.reduction == pytest.approx(costs.data_parallel.step_bytes / costs.step_bytes)


def test_rows_saved_are_those_of_the_mean_silo():
    assert plan(tiny("spec")).embedding_saved == (1000 - 700) * 4


def test_tokens_and_epochs_by_hand():
    costs = plan(tiny(rounds={"total": 3, "choose": 1}), tokens={"a": 60})
    a, b = costs.silos
    assert a.round_tokens == 10 * 2 * 8
    assert a.total_tokens == 3 * 160 / 2, "chosen every second round, on average"
    assert a.sources[0].epochs == 4.0
    assert b.sources[0].epochs is None
    assert costs.total_tokens == 480
    assert costs.total_steps == 30


def test_a_mixture_reads_by_size_to_the_temperature_and_weight():
    sources = [{"name": "a", "tokens": 100}, {"name": "b", "tokens": 400, "weight": 2.0}]
    (silo,) = plan(tiny("std", sources, mixture={"temperature": 0.5})).silos
    assert [reading.trained for reading in silo.sources] == pytest.approx([480 / 5, 480 * 4 / 5])
    (silo,) = plan(tiny("std", sources, mixture={"temperature": 0.0})).silos
    assert [reading.trained for reading in silo.sources] == pytest.approx([480 / 3, 480 * 2 / 3])


def test_shares_of_a_mixture_of_unknown_sizes_are_unknown_unless_uniform():
    sources = [{"name": "a", "tokens": 100}, {"name": "b"}]
    (silo,) = plan(tiny("std", sources)).silos
    assert [reading.trained for reading in silo.sources] == [None, None]
    (silo,) = plan(tiny("std", sources, mixture={"temperature": 0.0})).silos
    assert [reading.trained for reading in silo.sources] == [240, 240]


def test_a_source_read_too_often_is_named():
    assert any("a: read more than 4 times" in note for note in plan(tiny(), tokens={"a": 100, "b": 480}).notes)
    assert not any("read more than" in note for note in plan(tiny(), tokens={"a": 120, "b": 480}).notes)


def test_a_warm_up_as_long_as_the_run_is_told():
    (note,) = (note for note in plan(tiny()).notes if "warmup" in note)
    assert note.startswith("inner.warmup_steps = 100 of 30 steps in all: ")
    assert note.endswith("set it to a tenth of them, 3, or less")
    assert any("warmup" in note for note in plan(tiny(inner={"warmup_steps": 30})).notes)
    assert not any("warmup" in note for note in plan(tiny(inner={"warmup_steps": 29})).notes)


@pytest.mark.parametrize("layers", [1, 8])
def test_the_other_setting_of_checkpointing_is_named_by_what_is_set(layers: int):
    shape = {"layers": layers, "width": 4, "heads": 2}
    off, on = (printed(plan(tiny(model=shape, inner={"checkpoint_activations": on}))) for on in (False, True))
    assert ("with checkpoint_activations: " in off, "without " in off) == (True, False)
    assert "without checkpoint_activations: " in on


def test_memory_by_hand():
    memory = plan(tiny("spec")).silos[0].memory
    parameters = TINY_BODY + 2400 + 32
    assert (memory.weights, memory.gradients, memory.moments, memory.casts) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
        0,
    )
    # 16 tokens; a block keeps 8 D + 4 (6 D + 2 H) = 32 + 4 (24 + 32) bytes a token, the final norm 8 D.
    assert memory.activations == 16 * (256 + 32)
    assert memory.activations_otherwise == 16 * (16 + 256 + 32)
    parts = (memory.weights, memory.gradients, memory.moments, memory.casts, memory.activations, memory.loss)
    assert memory.total == sum(parts)


def test_a_rank_with_a_part_of_the_moments_holds_the_less():
    """Weights, gradients and activations are whole in each; the table says of whom it speaks."""
    whole, parts = (plan(tiny(resources={"ranks": 2, "shard": shard})) for shard in ("never", "moments"))
    one, other = whole.silos[0].memory, parts.silos[0].memory
    assert (other.weights, other.gradients, other.moments) == (one.weights, one.gradients, one.moments // 2)
    assert one.total - other.total == one.moments // 2
    assert "on each of 2 ranks: moments in 2 parts" in printed(parts)
    assert "on each of 2 ranks: moments whole" in printed(whole)
    assert "ranks" not in printed(plan(tiny()))


def test_a_rank_with_a_shard_of_the_model_holds_that_and_what_is_whole_during_a_pass():
    job = tiny(resources={"ranks": 2, "shard": "all"}, model={"layers": 4})
    silo = plan(job).silos[0]
    total, body = silo.parameters.total, silo.parameters.body
    assert silo.memory.weights == 4 * (total // 2 + total - body)
    assert silo.memory.gradients == silo.memory.weights + 2 * 4 * (body // 4), "of one block, and as it is sent"
    assert silo.memory.moments == 4 * 2 * total // 2
    assert silo.memory.casts == 4 * (2 * body // 4), "two blocks of four, fp32"
    assert "on each of 2 ranks: weights, gradients and moments in 2 parts" in printed(plan(job))
    alone = plan(tiny(resources={"shard": "all"}, model={"layers": 4})).silos[0].memory
    assert alone.weights == 4 * total, "one rank has nobody to share with"


def test_checkpointing_pays_from_two_blocks_on():
    job = tiny(model={"layers": 2})
    assert activation_bytes(job, 2, checkpointed=True) < activation_bytes(job, 2, checkpointed=False)


def test_bf16_keeps_a_copy_of_the_weights_and_halves_the_products():
    half, full = (tiny(inner={"precision": precision}) for precision in ("bf16", "fp32"))
    assert plan(half).silos[0].memory.casts == 2 * plan(half).silos[0].parameters.total
    assert activation_bytes(half, 2, False) < activation_bytes(full, 2, False)


def test_auto_precision_and_micro_batch_follow_the_silo_s_own_resources():
    sources = [{"name": "a", "resources": {"num_gpus": 1}}, {"name": "b"}]
    gpu, cpu = plan(tiny("glob", sources, inner={"precision": "auto", "batch_size": 32})).silos
    assert (gpu.memory.casts, cpu.memory.casts) == (2 * gpu.parameters.total, 0)
    assert (gpu.memory.loss_rows, cpu.memory.loss_rows) == (16 * 8, 32 * 8), "micro-batches, each in one chunk"


def test_micro_batches_are_those_that_a_silo_would_choose(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    job = tiny(inner={"batch_size": 64})
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert choose_hardware(job, 1, gpu=True, compile=False).micro_batch == GPU_MICRO_BATCH
    several = choose_hardware(job, 1, gpu=True, compile=False, ranks=8)
    assert several.micro_batch == 64 / 8
    assert several.peak_flops in (0.0, 8 * 989e12), "unknown where bf16 is not used"


def test_the_loss_holds_a_chunk_and_the_heads_gradient():
    # As measured with fp32 on a CPU, in the docstring of silo/loss.py: 320 MiB.
    assert loss_bytes(512, 50_257, 256) == pytest.approx(320 << 20, rel=0.1)
    assert loss_bytes(2, 10, 3) == 2 * 10 * 8 + 2 * 10 * 3 * 4


@pytest.mark.parametrize(("V", "N"), [(1000, 4096), (300_000, 4096), (250_112, 32_768), (1000, 100)])
@pytest.mark.parametrize("gpu", [0, 1])
def test_the_loss_is_planned_in_the_chunks_that_it_is_computed_in(V, N, gpu):
    rows = loss_rows(tiny(resources={"num_gpus": gpu}), N, V)
    if gpu:  # not at hand
        assert rows == min(N, loss.chunk_rows(V, "cuda"))
        return
    held = []

    def chunk(x, head, targets, x_wanted, weight_grad):
        held.append(len(x))
        return torch.zeros(()), None

    loss.linear_cross_entropy(torch.empty(N, 2), torch.empty(V, 2), torch.zeros(N, dtype=torch.int64), chunk=chunk)
    assert (rows, N) == (max(held), sum(held))


def test_llama_has_no_positions_to_send():
    assert all(silo.parameters.positions == 0 for silo in plan(tiny("trim", model={"arch": "llama"})).silos)


# Where |V_k| comes from.


def test_prepared_data_wins_over_the_job_file_and_the_job_file_over_the_tokenizer():
    sources = [{"name": "a", "vocab_size": 600}, {"name": "b", "vocab_size": 600}, {"name": "c"}]
    costs = plan(tiny("trim", sources), vocabulary_sizes={"a": 500})
    assert [(s.vocabulary_size, s.vocabulary_from) for s in costs.silos] == [
        (500, "prepared data"),
        (600, "sources.vocab_size"),
        (1000, "tokenizer.vocab_size"),
    ]
    assert any("|V_k| of c is not known yet" in note for note in costs.notes)


def test_under_a_global_vocabulary_every_silo_has_all_of_it():
    assert [silo.vocabulary_size for silo in plan(tiny("glob")).silos] == [1000, 1000]
    assert [silo.vocabulary_size for silo in plan(tiny("glob"), {"a": 990, "b": 990}).silos] == [990, 990]
    assert plan(tiny("std"), {"a": 990, "b": 990}).silos[0].vocabulary_size == 990


def test_own_tokenizers_are_compared_only_with_a_declared_global_vocabulary():
    alone = plan(tiny("spec-opt"))
    assert (alone.data_parallel, alone.reduction, alone.embedding_saved) == (None, None, None)
    assert any("tokenizer.global_vocab_size" in note for note in alone.notes)
    assert headline(alone) == f"SPEC-OPT sends {human(TINY_BODY / 10)} parameters per silo and step"
    compared = plan(tiny("spec-opt", tokenizer={"global_vocab_size": 5000}))
    assert compared.reduction == pytest.approx((TINY_BODY + 4 * 5000 + 32) / (TINY_BODY / 10))


def test_an_existing_tokenizer_of_unknown_size_is_refused():
    unknown = {"kind": "hub", "name": "someone/tokenizer"}
    values = tiny("glob").model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size: not set.*someone/tokenizer.*set it"):
        plan(parse_job({**values, "tokenizer": unknown}))
    assert plan(parse_job({**values, "tokenizer": {**unknown, "vocab_size": 700}})).silos[0].vocabulary_size == 700
    assert plan(parse_job({**values, "tokenizer": unknown}), {"a": 710, "b": 710}).silos[0].vocabulary_size == 710


def test_contradicting_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"1200 of a \(sources\.vocab_size\).*tokenizer\.vocab_size = 1000.*lower"):
        plan(tiny("trim", [{"name": "a", "vocab_size": 1200}]))
    with pytest.raises(ConfigError, match=r"tokenizer\.global_vocab_size = 900.*remove"):
        plan(tiny("glob", tokenizer={"global_vocab_size": 900}))


# What a reader sees.


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("std", "STD trains one silo on a mixture of 2 sources; no silo sends anything"),
        ("isolated", "ISOLATED trains 2 silos, each alone; no silo sends anything"),
        ("glob", "GLOB sends 10 times less than data-parallel training"),
    ],
)
def test_the_headline_says_it_in_a_sentence(method, words):
    assert headline(plan(tiny(method))) == words


def test_silos_that_cost_the_same_share_a_line():
    sources = [{"name": name, "vocab_size": size} for name, size in (("a", 600), ("b", 600), ("c", 700))]
    text = printed(plan(tiny("trim", sources)))
    assert "2 alike: a, b" in text
    assert "\nc " in text
