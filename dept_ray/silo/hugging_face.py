"""Our model as Hugging Face's: GPT2LMHeadModel and LlamaForCausalLM, by the names and shapes of their parameters.

Only names, shapes and one dictionary of settings, to and fro: nothing is read, written or trained, and `transformers`
is not needed. The two differ from ours in form alone: GPT-2's products are stored (in, out), Llama keeps apart the
queries, keys and values, and the gate and value, that we hold in one matrix each. The head is the token embedding,
stored once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dept_ray.sections import ModelSection

Tensors = Mapping[str, torch.Tensor]

_PARTS = {
    "gpt2": {
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    "llama": {
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
}
"""Ours -> theirs, within a block; several of theirs lie one under the other in ours."""
_BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}
_NORM = {"gpt2": "transformer.ln_f", "llama": "model.norm"}
_ENDS = {"gpt2": ("weight", "bias"), "llama": ("weight",)}
TABLES = {
    "gpt2": {"tokens": "transformer.wte.weight", "positions": "transformer.wpe.weight"},
    "llama": {"tokens": "model.embed_tokens.weight"},
}
"""Of an embedding: ours -> theirs."""


_MENDED_BY = {
    "n_positions": "model.positions",
    "max_position_embeddings": "model.positions",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "n_layer": "model.layers",
    "num_hidden_layers": "model.layers",
    "n_head": "model.heads",
    "num_attention_heads": "model.heads",
    "n_inner": "model.mlp_width",
    "intermediate_size": "model.mlp_width",
    "num_key_value_heads": "model.kv_heads",
    "layer_norm_epsilon": "model.norm_eps",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rope_theta",
}
"""Their settings that keys of ours decide."""
_ONLY: dict[str, Callable[[ModelSection], dict[str, Any]]] = {
    "gpt2": lambda section: {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    },
    "llama": lambda section: {
        "rope_type": "default", "head_dim": section.width // section.heads, "partial_rotary_factor": 1.0,
        "sliding_window": None,
    },
}  # fmt: skip
"""What ours computes beside `settings_of`, which leaves it to their defaults."""
_SILENT: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "llama": {
        "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    },
}  # fmt: skip
"""What transformers takes where a config.json says nothing."""
_ALIKE = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
_OF_THE_TEXT = {
    "architectures", "vocab_size", "bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range", "dtype",
    "torch_dtype", "embd_pdrop", "attn_pdrop", "resid_pdrop",
}  # fmt: skip
"""No matter of the body: of the vocabulary, of how it was drawn, stored or trained."""


def settings_of(section: ModelSection, vocabulary_size: int, positions: int, end_of_text: int) -> dict[str, Any]:
    """The `config.json` with which transformers builds this model.

    Args:
        section: the shape of the body.
        vocabulary_size: V, rows of the embedding.
        positions: L; of a llama, the length that it was trained on.
        end_of_text: the row that begins and ends a text.
    """
    both = {
        "vocab_size": vocabulary_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",  # what versions before 5 call it
    }
    if section.arch == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": positions,
            "n_embd": section.width,
            "n_layer": section.layers,
            "n_head": section.heads,
            "n_inner": section.hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": section.epsilon,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            **both,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": positions,
        "hidden_size": section.width,
        "intermediate_size": section.hidden,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "num_key_value_heads": section.head_groups[1],
        "hidden_act": "silu",
        "rms_norm_eps": section.epsilon,
        "rope_theta": section.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        **both,
    }


def differences(section: ModelSection, positions: int | None, theirs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What keeps a body of these shapes from being that of a `config.json`.

    Args:
        section: the shape of the body.
        positions: L that the checkpoint must have; None: any.
        theirs: the settings that were found.

    Returns:
        What other settings of `[model]` would mend, and what nothing would, each told as key, value and what is there.
    """
    kind = str(theirs.get("model_type"))
    if kind != section.arch:
        told = f"model.arch = {section.arch!r}, there model_type = {kind!r}"
        return ([told], []) if kind in _PARTS else ([], [told])
    there = {**_SILENT[kind], **{key: value for key, value in theirs.items() if value is not None}}
    turning = there.get("rope_parameters") or there.get("rope_scaling") or {}  # as from version 5 on, and before
    there = {"rope_type": turning.get("type", "default"), **there, **turning}
    there.setdefault("n_inner", 4 * there.get("n_embd", 0))
    heads = there.get("num_attention_heads", 1)
    there.setdefault("num_key_value_heads", heads)
    there.setdefault("head_dim", there.get("hidden_size", 0) // heads)
    mend, cannot = list[str](), list[str]()
    for key, ours in {**settings_of(section, 0, positions or 0, 0), **_ONLY[kind](section)}.items():
        any_will_do = positions is None and _MENDED_BY.get(key) == "model.positions"
        if key not in there or key in _OF_THE_TEXT or any_will_do:
            continue
        found = _ALIKE.get(there[key], there[key]) if isinstance(there[key], str) else there[key]
        if found != ours and key in _MENDED_BY:
            mend.append(f"{_MENDED_BY[key]} = {ours!r}, there {key} = {found!r}")
        elif found != ours:
            cannot.append(f"{key} = {found!r} there, {ours!r} is all that this package computes")
    return mend, cannot


def to_hugging_face(section: ModelSection, ours: Tensors) -> dict[str, torch.Tensor]:
    """Parameters of a `LanguageModel` (its state_dict), named and shaped as transformers' are.

    Returns:
        Views where the shapes allow it; without a head, which is the token embedding.
    """
    theirs = {name: ours[f"embedding.{table}"] for table, name in TABLES[section.arch].items()}
    for our, names in _pairs(section):
        parts = _parts(section, ours[f"body.{our}"], len(names))
        theirs |= {name: _stored(section, part) for name, part in zip(names, parts, strict=True)}
    return theirs


def body_from(section: ModelSection, take: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a `Body`, fp32, by our names.

    Args:
        section: the shape of the body.
        take: a tensor by transformers' name.
    """
    return {our: torch.cat([_stored(section, take(name)) for name in names]).float() for our, names in _pairs(section)}


def _pairs(section: ModelSection) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of each parameter of a body: our name, and theirs."""
    at = _BLOCKS[section.arch]
    for end in _ENDS[section.arch]:
        yield f"norm.{end}", (f"{_NORM[section.arch]}.{end}",)
        for i in range(section.layers):
            for our, theirs in _PARTS[section.arch].items():
                yield f"blocks.{i}.{our}.{end}", tuple(f"{at}.{i}.{their}.{end}" for their in theirs)


def _parts(section: ModelSection, whole: torch.Tensor, number: int) -> Sequence[torch.Tensor]:
    """Ours, cut into so many of theirs: three are queries, keys and values, of which the queries may be more."""
    if number == len(section.head_groups):
        return whole.split([heads * section.width // section.heads for heads in section.head_groups])
    return whole.chunk(number)


def _stored(section: ModelSection, tensor: torch.Tensor) -> torch.Tensor:
    """Ours <-> theirs: of a matrix of GPT-2's (out, in) <-> (in, out), all else as it is."""
    return tensor.T if section.arch == "gpt2" and tensor.dim() == 2 else tensor
