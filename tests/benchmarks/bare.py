"""The bare loop: the best that we could write by hand, against which a silo is measured. A side; it is no benchmark.

Plain PyTorch in one process with all cores: no rounds, no snapshots, no stream, batches from an array in memory. Where
the processor has bf16 products they are used; forward and loss are compiled together. Attention is written in four ways
and the fastest on this machine is taken. It shares no line with the package, so that it can be better.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from reference import SIZES, Size
from sides import SPEED, Figures, Ready, serve
from torch import nn

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""What anybody who has measured gives such a process before it starts (SPEED of a step x1.6)."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q, k, v of (B, H, T, Dh) -> (B, H, T, Dh)."""


def by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> torch.Tensor:
    """Written out, `rows` rows at a time against the keys that they see."""
    out = []
    for start in range(0, q.shape[2], rows):
        end = min(start + rows, q.shape[2])
        scores = q[:, :, start:end] @ k[:, :, :end].mT * q.shape[-1] ** -0.5
        future = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        out.append(scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(out, 2)


WAYS: dict[str, Attend] = {
    "flash": partial(F.scaled_dot_product_attention, is_causal=True),
    "written out": partial(by_rows, rows=1 << 30),
    "by 128 rows": partial(by_rows, rows=128),
    "by 64 rows": partial(by_rows, rows=64),
}


class GPT(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.size, self.attend, D = size, attend, size.width
        self.tokens, self.positions = nn.Embedding(size.vocabulary, D), nn.Embedding(size.context, D)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(D), "qkv": nn.Linear(D, 3 * D), "out": nn.Linear(D, D),
                "norm2": nn.LayerNorm(D), "up": nn.Linear(D, 4 * D), "down": nn.Linear(4 * D, D),
            })
            for _ in range(size.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(D)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        (B, T), H = ids.shape, self.size.heads
        x = self.tokens(ids) + self.positions.weight[:T]
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)
            x = x + block["out"](self.attend(q, k, v).transpose(1, 2).reshape(B, T, -1))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x)), approximate="tanh"))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Loop:
    """A model in training."""

    def __init__(self, size: Size, tokens: torch.Tensor, way: str) -> None:
        torch.manual_seed(0)
        self.size, self.tokens = size, tokens
        self.model = GPT(size, WAYS[way])
        self.loss_of = torch.compile(self.model) if size.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0, fused=True)
        self.bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.loss = torch.zeros(())

    def steps(self, count: int, made: Callable[[], None] | None = None) -> float:
        """Train, and call `made` after each step; seconds."""
        began = time.perf_counter()
        for _ in range(count):
            rows = self.tokens[torch.randint(len(self.tokens), (self.size.batch,))].long()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                self.loss = self.loss_of(rows[:, :-1], rows[:, 1:])
            self.loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if made is not None:
                made()
        return time.perf_counter() - began


def read_tokens(file: Path, size: Size) -> torch.Tensor:
    """Blocks of a file of uint16: (n, T + 1) int32."""
    flat, T = np.fromfile(file, np.uint16), size.context
    return torch.from_numpy(np.stack([flat[i : i + T + 1] for i in range(0, len(flat) - T - 1, T)]).astype(np.int32))


def get_ready(size: Size, file: Path, threads: int, steps: int) -> Ready:
    """Try every way of attention for a few steps, keep the fastest."""
    torch.set_num_threads(threads)
    tokens = read_tokens(file, size)
    loops = {way: Loop(size, tokens, way) for way in WAYS}
    for loop in loops.values():
        loop.steps(2)
    took = {way: min(loop.steps(3) for _ in range(3)) / 3 for way, loop in loops.items()}
    best = min(took, key=took.__getitem__)
    loop = loops[best]

    def measure() -> Figures:
        before = time.process_time()
        seconds, cpu_s = loop.steps(steps), time.process_time() - before
        tokens = steps * size.step_tokens
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "cpu_s_per_mtoken": cpu_s / tokens * 1e6,
            "loss": round(loop.loss.item(), 3),
        }

    about = {
        "attention": best,
        "step_ms": {way: round(s * 1e3) for way, s in took.items()},
        "precision": "bf16" if loop.bf16 else "fp32",
        "threads": threads,
    }
    return about, {SPEED: measure}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, required=True)
    asked = parser.parse_args(sys.argv[1:])
    serve(lambda: get_ready(SIZES[asked.size], asked.tokens, asked.threads, asked.steps))
