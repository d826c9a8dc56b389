"""Our model as Hugging Face's: GPT2LMHeadModel and LlamaForCausalLM, by the names and shapes of their parameters.

Only names, shapes and one dictionary of settings: nothing is read, written or trained, and `transformers` is not
needed. The two differ from ours in form alone: GPT-2's products are stored (in, out), Llama keeps apart the queries,
keys and values, and the gate and value, that we hold in one matrix each. The head is the token embedding, stored once.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dept_ray.sections import ModelSection
from dept_ray.silo.model import NORM_EPS, ROPE_THETA

Tensors = Mapping[str, torch.Tensor]

_GPT2_PARTS = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_LLAMA_PARTS = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
"""Ours -> theirs; several of theirs lie one under the other in ours."""


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
            "layer_norm_epsilon": NORM_EPS["gpt2"],
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
        "num_key_value_heads": section.heads,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS["llama"],
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        **both,
    }


def to_hugging_face(section: ModelSection, ours: Tensors) -> dict[str, torch.Tensor]:
    """Parameters of a `LanguageModel` (its state_dict), named and shaped as transformers' are.

    Returns:
        Views where the shapes allow it; without a head, which is the token embedding.
    """
    if section.arch == "gpt2":
        theirs = {"transformer.wte.weight": ours["embedding.tokens"],
                  "transformer.wpe.weight": ours["embedding.positions"]}  # fmt: skip
        for end in ("weight", "bias"):
            theirs[f"transformer.ln_f.{end}"] = ours[f"body.norm.{end}"]
            for i in range(section.layers):
                for our, their in _GPT2_PARTS.items():
                    theirs[f"transformer.h.{i}.{their}.{end}"] = _turned(ours[f"body.blocks.{i}.{our}.{end}"])
        return theirs
    theirs = {"model.embed_tokens.weight": ours["embedding.tokens"], "model.norm.weight": ours["body.norm.weight"]}
    for i in range(section.layers):
        for our, names in _LLAMA_PARTS.items():
            parts = ours[f"body.blocks.{i}.{our}.weight"].chunk(len(names))
            theirs |= {f"model.layers.{i}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return theirs


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """(out, in) <-> (in, out) of a matrix; a vector as it is."""
    return tensor.T if tensor.dim() == 2 else tensor
