"""The transformer: a shared `Body`, a silo's own `Embedding`, and the `LanguageModel` that the two make.

It does not train, cast or talk: autocast, devices and compilation are the caller's, parameters are fp32 always. The
one idea: all of theta lives in *one* flat vector whose order a `Layout` fixes, so that an optimizer steps on one tensor
and the body travels without being packed. Both architectures compute what Hugging Face's GPT2LMHeadModel and
LlamaForCausalLM compute. Shapes: B batch, T time, D width, V rows, H heads, F the MLP's hidden width, L positions.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dept_ray.draws import digest
from dept_ray.sections import ModelSection
from dept_ray.silo.attention import causal_attention
from dept_ray.silo.loss import IGNORED, Chunk, linear_cross_entropy, loss_of_chunk

__all__ = [
    "IGNORED",
    "Body",
    "Embedding",
    "LanguageModel",
    "Layout",
    "Sizes",
    "flatten_gradients",
    "flatten_parameters",
    "initialise",
    "layout_of",
    "num_parameters",
]

STD = 0.02

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of every position's angles, fp32 (T, D / H / 2)."""


class Body(nn.Module):
    """theta: the blocks and the final norm, (B, T, D) -> (B, T, D)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.layers))
        self.norm = _norm(section)
        self.head_width = section.width // section.heads if section.arch == "llama" else 0
        self.theta = section.rope_theta
        self.recompute = False
        """Whether the backward pass computes each block again instead of keeping its activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.by(self.blocks, x)

    def by(self, blocks: Iterable[Callable[..., torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        """The same by other ways to compute each block (`compiling`)."""
        rotation = _rotation(x.shape[1], self.head_width, self.theta, x.device) if self.head_width else None
        for block in blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.attention_norm = _norm(section)
        self.attention = Attention(section)
        self.mlp_norm = _norm(section)
        self.mlp = MLP(section)

    def forward(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class _Linear(nn.Linear):
    """Holds whatever memory held until it is given values: torch's own draws would all be overwritten."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values in one product, of which queries may be more (grouped)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        D, bias = section.width, section.arch == "gpt2"
        self.heads, self.head_width = section.head_groups, D // section.heads
        self.qkv = _Linear(D, sum(self.heads) * self.head_width, bias)
        self.out = _Linear(D, D, bias)

    def forward(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        B, T, D = x.shape
        heads = self.qkv(x).view(B, T, sum(self.heads), self.head_width).transpose(1, 2)
        q, k, v = heads.split(self.heads, 1)  # (B, H, T, Dh) each; of keys and values, H may be a part of the queries'
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        return self.out(causal_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """gpt2: down(gelu(up(x))). llama: down(silu(gate) * value), where gate and value are the two halves of up(x)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.gated, bias = section.arch == "llama", section.arch == "gpt2"
        self.up = _Linear(section.width, section.hidden * (2 if self.gated else 1), bias)
        self.down = _Linear(section.hidden, section.width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.gated:
            gate, value = x.chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x, approximate="tanh"))


class Embedding(nn.Module):
    """phi and psi, a silo's own: ids (B, T) -> (B, T, D). `positions` is None where positions are rotary."""

    def __init__(self, vocabulary_size: int, section: ModelSection, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(vocabulary_size, section.width))
        learned = section.arch == "gpt2"
        self.positions = nn.Parameter(torch.zeros(positions, section.width)) if learned else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.tokens)
        if self.positions is None:
            return x
        assert ids.shape[1] <= len(self.positions), f"{ids.shape[1]} tokens, but {len(self.positions)} positions"
        return x + self.positions[: ids.shape[1]]


class LanguageModel(nn.Module):
    """A body between an embedding and its transpose."""

    def __init__(self, body: Body, embedding: Embedding) -> None:
        super().__init__()
        self.body = body
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return F.linear(self.hidden(ids), self.embedding.tokens)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head is given: (B, T, D) of ids (B, T)."""
        return self.body(self.embedding(ids))

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of cross-entropies in nats, 0-dim fp32, of the targets (B, T) that are not `IGNORED`."""
        return self.loss_by(self.body, loss_of_chunk, ids, targets)

    def loss_by(
        self, body: Callable[[torch.Tensor], torch.Tensor], chunk: Chunk, ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The same by other ways to compute the body, and a chunk of the loss (`compiling`)."""
        x = body(self.embedding(ids))
        return linear_cross_entropy(x.flatten(0, 1), self.embedding.tokens, targets.flatten(), chunk=chunk)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices and embeddings N(0, 0.02), biases 0, norms 1; what writes to the residual stream / sqrt(2 * layers).

    Drawn in the order of names, on the CPU, in fp64 and rounded: fp32 draws differ in the last bits between processors
    (torch draws them with vector instructions where it has them).
    """
    layers = sum(isinstance(part, Block) for part in module.modules())
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() < 2:
            values = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            std = STD / math.sqrt(2 * layers) if name.endswith(("attention.out.weight", "mlp.down.weight")) else STD
            values = torch.empty(parameter.shape, dtype=torch.float64).normal_(0, std, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)


@dataclass(frozen=True)
class Layout:
    """The order of a module's parameters in one flat vector: matrices by name, then vectors (biases, norms) by name."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """That of a module, which may be on the meta device."""
        ordered = sorted(module.named_parameters(), key=lambda named: (named[1].dim() < 2, named[0]))
        return cls(tuple(name for name, _ in ordered), tuple(tuple(p.shape) for _, p in ordered))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each parameter begins."""
        return tuple(itertools.accumulate(map(math.prod, self.shapes[:-1]), initial=0))

    @property
    def size(self) -> int:
        """Elements in all."""
        return sum(map(math.prod, self.shapes))

    @property
    def matrix_size(self) -> int:
        """Leading elements that belong to matrices: what weight decay is for."""
        return sum(math.prod(shape) for shape in self.shapes if len(shape) > 1)

    @property
    def fingerprint(self) -> str:
        """Same fingerprint, same meaning of every element."""
        return digest(*(f"{name}{shape}" for name, shape in zip(self.names, self.shapes, strict=True)))

    def flat(self, named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Parameters by name as one vector (size,)."""
        return torch.cat([named[name].detach().flatten() for name in self.names])

    def views(self, flat: Any) -> dict[str, Any]:
        """Each parameter's part of a flat vector (torch or numpy), by name, in its shape and without a copy."""
        parts = zip(self.names, self.offsets, self.shapes, strict=True)
        return {name: flat[start : start + math.prod(shape)].reshape(shape) for name, start, shape in parts}


@functools.cache
def layout_of(section: ModelSection) -> Layout:
    """That of a body of this shape; nothing is allocated, and it is worked out once."""
    with torch.device("meta"):
        return Layout.of(Body(section))


def flatten_parameters(module: nn.Module, layout: Layout) -> torch.Tensor:
    """Move a module's parameters into one flat fp32 vector (layout.size,), of which they become views.

    Call it after `.to(device)`, which would undo it, and before compiling.
    """
    parameters = dict(module.named_parameters())
    device = parameters[layout.names[0]].device
    flat = torch.empty(layout.size, dtype=torch.float32, device=device)
    values = layout.views(flat)
    for name, parameter in parameters.items():
        values[name].copy_(parameter.detach())
        parameter.data = values[name]
    return flat


def flatten_gradients(module: nn.Module, layout: Layout) -> torch.Tensor:
    """Let the gradients of a module with flat parameters be views of one flat vector (layout.size,) of zeros.

    Backward passes add to it in place as long as it is emptied by `zero_()`, never by dropping `p.grad`. They share its
    memory without being views to torch, whose compiler would make the base anew for each: 20 ms a parameter.
    """
    flat = torch.zeros(layout.size, device=next(module.parameters()).device)
    grads = layout.views(flat)
    for name, parameter in module.named_parameters():
        view = grads[name]
        parameter.grad = torch.empty(0, device=flat.device).set_(
            view.untyped_storage(), view.storage_offset(), view.shape, view.stride()
        )
    return flat


@dataclass(frozen=True)
class Sizes:
    """Parameters of a silo's model."""

    body: int
    tokens: int
    positions: int

    @property
    def total(self) -> int:
        return self.body + self.tokens + self.positions


def num_parameters(section: ModelSection, positions: int, vocabulary_size: int) -> Sizes:
    """Counted without building anything.

    >>> num_parameters(ModelSection(), positions=1024, vocabulary_size=50_257).total  # GPT-2
    124439808
    """
    D, hidden = section.width, section.hidden
    if section.arch == "gpt2":
        block = 4 * D * D + 2 * D * hidden + (4 * D + hidden + D) + 4 * D  # products, their biases, two LayerNorms
        return Sizes(section.layers * block + 2 * D, vocabulary_size * D, positions * D)
    heads = section.heads + sum(section.head_groups)  # of what goes in and out of attention, each of width Dh
    block = D * heads * (D // section.heads) + 3 * D * hidden + 2 * D
    return Sizes(section.layers * block + D, vocabulary_size * D, 0)


def _norm(section: ModelSection) -> nn.Module:
    make = nn.LayerNorm if section.arch == "gpt2" else nn.RMSNorm
    return make(section.width, eps=section.epsilon)


def _rotation(T: int, head_width: int, theta: float, device: torch.device) -> Rotation:
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    angles = torch.arange(T, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + Dh/2]) by their position's angles: Hugging Face's pairs, not RoFormer's."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
