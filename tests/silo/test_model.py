"""What the model computes is what Hugging Face computes; where its parameters lie is what `Layout` says."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from dept_ray.sections import ModelSection
from dept_ray.silo import attention
from dept_ray.silo.attention import causal_attention
from dept_ray.silo.compiling import compile_now, compiled_loss
from dept_ray.silo.model import (
    IGNORED,
    Body,
    Embedding,
    LanguageModel,
    Layout,
    flatten_gradients,
    flatten_parameters,
    initialise,
    num_parameters,
)

V, L, T = 53, 24, 20
ARCHS: tuple[Literal["gpt2", "llama"], ...] = ("gpt2", "llama")
SECTIONS = {arch: ModelSection(arch=arch, layers=2, width=32, heads=4) for arch in ARCHS}

GROUPED = ModelSection(arch="llama", layers=2, width=32, heads=4, kv_heads=2, norm_eps=1e-3, rope_theta=500.0)
"""Queries that share keys and values, and other constants; all three differ enough to be seen in a logit."""

both = pytest.mark.parametrize("section", SECTIONS.values(), ids=ARCHS)


def make(section: ModelSection, seed: int = 0) -> LanguageModel:
    model = LanguageModel(Body(section), Embedding(V, section, L))
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def make_rough(section: ModelSection) -> LanguageModel:
    """Far from initialisation: biases and norms that do something, weights that make attention sharp."""
    model = make(section)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows: int = 3, length: int = T) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------ Hugging Face


def gpt2_twin(model: LanguageModel, section: ModelSection) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=L, n_embd=section.width, n_layer=section.layers, n_head=section.heads,
        n_inner=section.hidden, activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {"wte.weight": ours["embedding.tokens"], "wpe.weight": ours["embedding.positions"]}
    parts = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
             "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # fmt: skip
    for i in range(section.layers):
        for our, their in parts.items():
            weight = ours[f"body.blocks.{i}.{our}.weight"]
            theirs[f"h.{i}.{their}.weight"] = weight.T if weight.dim() == 2 else weight  # Conv1D holds (in, out)
            theirs[f"h.{i}.{their}.bias"] = ours[f"body.blocks.{i}.{our}.bias"]
    theirs |= {f"ln_f.{end}": ours[f"body.norm.{end}"] for end in ("weight", "bias")}
    twin = transformers.GPT2LMHeadModel(config)
    twin.transformer.load_state_dict(theirs)
    return twin.eval()


def llama_twin(model: LanguageModel, section: ModelSection) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=L, hidden_size=section.width, num_hidden_layers=section.layers,
        num_attention_heads=section.heads, num_key_value_heads=section.kv_heads, intermediate_size=section.hidden,
        rms_norm_eps=section.norm_eps or 1e-6, hidden_act="silu", tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {"embed_tokens.weight": ours["embedding.tokens"], "norm.weight": ours["body.norm.weight"]}
    for i in range(section.layers):
        mine = {name: ours[f"body.blocks.{i}.{name}.weight"] for name in
                ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")}  # fmt: skip
        shared = section.width * (section.kv_heads or section.heads) // section.heads
        q, k, v = mine["attention.qkv"].split([section.width, shared, shared])
        gate, up = mine["mlp.up"].chunk(2)
        block = {"input_layernorm": mine["attention_norm"], "post_attention_layernorm": mine["mlp_norm"],
                 "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": mine["attention.out"],
                 "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": mine["mlp.down"]}  # fmt: skip
        theirs |= {f"layers.{i}.{name}.weight": weight for name, weight in block.items()}
    twin = transformers.LlamaForCausalLM(config)
    twin.model.load_state_dict(theirs)
    return twin.eval()


@pytest.mark.parametrize(
    ("section", "twin_of"),
    [(SECTIONS["gpt2"], gpt2_twin), (SECTIONS["llama"], llama_twin), (GROUPED, llama_twin)],
    ids=[*ARCHS, "grouped"],
)
def test_logits_are_those_of_hugging_face(section: ModelSection, twin_of: Callable[..., Any]) -> None:
    model = make_rough(section)
    twin = twin_of(model, section)
    ids = some_ids()
    with torch.no_grad():
        theirs = twin(ids).logits
        assert theirs.std() > 1  # the comparison is of something
        torch.testing.assert_close(model(ids), theirs, rtol=1e-5, atol=1e-5 * theirs.std().item())
    assert num_parameters(section, L, V).total == sum(p.numel() for p in twin.parameters())


# ------------------------------------------------------------------------------------------------ the mathematics


@both
def test_no_logit_depends_on_a_later_token(section: ModelSection) -> None:
    model = make_rough(section)
    x = model.embedding(some_ids()).detach().requires_grad_()
    at = 7
    (grad,) = torch.autograd.grad(model.body(x)[:, at].square().sum(), x)
    assert not grad[:, at + 1 :].any()
    assert grad[:, : at + 1].abs().sum(-1).all()


@pytest.mark.parametrize("length", [1, 5, 64, 129, attention.SHORT, attention.SHORT + 1])
def test_attention_is_the_softmax_of_its_definition(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v, out_grad = (torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    scores = q @ k.mT / math.sqrt(8)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(mask, -math.inf).softmax(-1) @ v
    got = causal_attention(q, k, v)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), out_grad), torch.autograd.grad(expected, (q, k, v), out_grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [7, attention.SHORT + 1])
def test_neighbours_among_the_queries_share_keys_and_values(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 8, generator=generator) for heads in (6, 2, 2))
    one_by_one = [causal_attention(q[:, [i]], k[:, [i // 3]], v[:, [i // 3]]) for i in range(6)]
    torch.testing.assert_close(causal_attention(q, k, v), torch.cat(one_by_one, 1))


def test_attention_in_bf16_is_as_near_to_exact_as_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 4, 256, 64, generator=generator).bfloat16() for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    ours = causal_attention(q, k, v)
    monkeypatch.setattr(attention, "SHORT", 0)
    theirs = causal_attention(q, k, v)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@both
def test_loss_is_the_sum_in_nats_over_what_is_scored(section: ModelSection) -> None:
    model = make_rough(section)
    ids, targets = some_ids(), some_ids().roll(1, 0)
    targets[:, ::3] = IGNORED
    log_p = model(ids).log_softmax(-1)
    by_hand = -sum(log_p[b, t, targets[b, t]] for b in range(3) for t in range(T) if targets[b, t] != IGNORED)
    loss = model.loss(ids, targets)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


@both
def test_under_autocast_the_loss_is_near_and_gradients_are_fp32(section: ModelSection) -> None:
    model = make(section)
    ids, targets = some_ids(), some_ids().roll(1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
    torch.testing.assert_close(loss, model.loss(ids, targets), rtol=1e-3, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@both
def test_recomputed_blocks_give_the_same_gradients(section: ModelSection) -> None:
    model = make_rough(section)
    ids, targets = some_ids(), some_ids().roll(1, 0)
    kept = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    model.body.recompute = True
    again = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


# ------------------------------------------------------------------------------------------------ initialise


@both
def test_initialise_repeats_and_has_nothing_to_do_with_the_global_generator(section: ModelSection) -> None:
    model = LanguageModel(Body(section), Embedding(V, section, L))
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        initialise(model, torch.Generator().manual_seed(0))
        assert torch.equal(before, torch.get_rng_state())
        states.append({name: p.clone() for name, p in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = make(section, seed=1).state_dict()
    assert not torch.equal(states[0]["embedding.tokens"], other["embedding.tokens"])


@both
def test_initial_scales(section: ModelSection) -> None:
    wide = section.model_copy(update={"width": 128, "layers": 3})
    model = LanguageModel(Body(wide), Embedding(1000, wide, L))
    initialise(model, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


INITIAL_BYTES = """
import torch
from dept_ray.sections import ModelSection
from dept_ray.draws import digest
from dept_ray.silo.model import Body, initialise
initialise(body := Body(ModelSection(layers=2, width=40, heads=4)), torch.Generator().manual_seed(0))
print(digest(*(p.detach().numpy().tobytes() for p in body.parameters())))
"""


def test_initial_values_do_not_depend_on_vector_instructions() -> None:
    prints = set()
    for capability in ("default", None):  # None: the best that this processor has
        chosen = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
        env = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"} | chosen
        command = [sys.executable, "-c", INITIAL_BYTES]
        prints.add(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert len(prints) == 1


# ------------------------------------------------------------------------------------------------ sizes and layout


@pytest.mark.parametrize("mlp_width", [None, 48])
@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_are_those_of_the_modules(arch: Literal["gpt2", "llama"], mlp_width: int | None) -> None:
    section = ModelSection(arch=arch, layers=3, width=24, heads=2, mlp_width=mlp_width)
    sizes = num_parameters(section, L, V)
    body, embedding = Body(section), Embedding(V, section, L)
    assert sizes.body == sum(p.numel() for p in body.parameters()) == Layout.of(body).size
    assert sizes.tokens == embedding.tokens.numel()
    assert sizes.positions == (0 if embedding.positions is None else embedding.positions.numel())


@both
def test_layout_has_matrices_first_each_group_by_name(section: ModelSection) -> None:
    body = Body(section)
    layout = Layout.of(body)
    matrices = [name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) == 2]
    vectors = [name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) == 1]
    assert list(layout.names) == sorted(matrices) + sorted(vectors)
    assert layout.matrix_size == layout.offsets[len(matrices)]
    assert layout.matrix_size == sum(p.numel() for p in body.parameters() if p.dim() == 2)
    with torch.device("meta"):
        assert Layout.of(Body(section)) == layout


def test_layout_fingerprints_tell_layouts_apart() -> None:
    sections = [*SECTIONS.values(), SECTIONS["gpt2"].model_copy(update={"mlp_width": 96})]
    prints = {Layout.of(Body(section)).fingerprint for section in sections}
    assert len(prints) == 3
    assert Layout.of(Body(sections[0])).fingerprint in prints


def test_what_is_shared_is_told_by_its_place_and_not_by_a_part_of_its_name() -> None:
    """A body with parameters whose names contain each other, and the embedding's: all of them are in its vector."""

    class Confusing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number, name in enumerate(("tokens", "tokens_norm", "norm_tokens", "positions", "wte", "wte_norm")):
                self.register_parameter(name, torch.nn.Parameter(torch.full((2, 3 + number), float(number))))

    body = Confusing()
    layout = Layout.of(body)
    assert sorted(layout.names) == sorted(dict(body.named_parameters()))
    assert layout.size == sum(parameter.numel() for parameter in body.parameters())
    flat = torch.cat([dict(body.named_parameters())[name].detach().flatten() for name in layout.names]).numpy()
    for name, view in layout.views(flat).items():
        assert np.array_equal(view, dict(body.named_parameters())[name].detach().numpy()), name
    model = make_rough(SECTIONS["gpt2"])
    shared = {f"body.{name}" for name in Layout.of(model.body).names}
    assert {name for name, _ in model.named_parameters()} - shared == {"embedding.tokens", "embedding.positions"}


def test_layout_views_share_memory_with_numpy_and_torch() -> None:
    layout = Layout.of(Body(SECTIONS["gpt2"]))
    flat = np.zeros(layout.size, np.float32)
    layout.views(flat)["norm.bias"][:] = 1
    assert flat.sum() == SECTIONS["gpt2"].width
    assert {name: view.shape for name, view in layout.views(flat).items()} == dict(
        zip(layout.names, layout.shapes, strict=True)
    )


def flat_twins(section: ModelSection) -> tuple[LanguageModel, LanguageModel, torch.Tensor, torch.Tensor]:
    """A model as torch makes it, and the same model flattened."""
    usual, flattened = make_rough(section), make_rough(section)
    layout = Layout.of(flattened.body)
    flat = flatten_parameters(flattened.body, layout)
    flat_grad = flatten_gradients(flattened.body, layout)
    return usual, flattened, flat, flat_grad


def flat_gradient(model: LanguageModel) -> torch.Tensor:
    named = dict(model.body.named_parameters())
    grads = [named[name].grad for name in Layout.of(model.body).names]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_backward_passes_add_up_in_the_flat_gradient(section: ModelSection, autocast: bool) -> None:
    usual, flattened, flat, flat_grad = flat_twins(section)
    where = {name: p.grad for name, p in flattened.body.named_parameters()}
    assert not any(grad is None or grad._is_view() for grad in where.values()), "the compiler is slow with views"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # one context over all, as in the training loop
        for rows in some_ids(6).split(2):
            for model in (usual, flattened):
                (model.loss(rows[:, :-1], rows[:, 1:]) / 10).backward()
    assert torch.equal(flat_grad, flat_gradient(usual))
    assert flat_grad.any()
    for name, p in flattened.body.named_parameters():
        assert p.grad is where[name]
    flat_grad.zero_()
    assert not any(p.grad.any() for p in flattened.body.parameters() if p.grad is not None)
    flat.add_(1)
    for ours, theirs in zip(flattened.body.parameters(), usual.body.parameters(), strict=True):
        assert torch.equal(ours, theirs + 1)


def test_one_optimizer_step_on_the_flat_vector_is_that_of_the_parts() -> None:
    usual, flattened, flat, flat_grad = flat_twins(SECTIONS["gpt2"])
    whole = torch.nn.Parameter(flat)
    whole.grad = flat_grad
    ours = torch.optim.AdamW([whole], lr=1e-2, fused=True)
    theirs = torch.optim.AdamW(usual.body.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        for model in (usual, flattened):
            model.loss(some_ids(), some_ids().roll(1, 0)).backward()
        ours.step()
        theirs.step()
        ours.zero_grad(set_to_none=False)
        theirs.zero_grad(set_to_none=False)
    for mine, other in zip(flattened.body.parameters(), usual.body.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@both
def test_state_dicts_go_in_and_out_of_the_flat_vector(section: ModelSection) -> None:
    _, flattened, flat, _ = flat_twins(section)
    other = make(section, seed=3)
    flattened.load_state_dict(other.state_dict())
    expected = other.body.state_dict()
    views = Layout.of(flattened.body).views(flat)
    assert all(torch.equal(views[name], expected[name]) for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in flattened.body.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler: of torch.jit
@both
def test_compiled_backward_passes_add_up_in_the_flat_gradient(section: ModelSection) -> None:
    usual, flattened, _, flat_grad = flat_twins(section)
    compiled = compiled_loss(flattened)
    compile_now(compiled, list(flattened.parameters()), (2, some_ids(6).shape[1] - 1), autocast=False)
    for rows in some_ids(6).split(2):
        usual.loss(rows[:, :-1], rows[:, 1:]).backward()
        compiled(rows[:, :-1], rows[:, 1:]).backward()
    torch.testing.assert_close(flat_grad, flat_gradient(usual), rtol=1e-4, atol=1e-4)
