"""What a silo runs on, and every choice that follows from it, in one place (SPEED.md): device, threads, precision,
compilation.

Chosen from the job as the run began and from the machine, never from how far it is or what people changed since, so
that a resumed run makes the same choices and therefore the same bits. Attention and the loss choose for themselves, by
device and size (`attention`, `loss`).
"""

import os
from dataclasses import dataclass, replace

import torch

from dept_ray.config import Job
from dept_ray.errors import ClusterError
from dept_ray.silo.flops import peak_flops

_COMPILE_PAYS_AFTER_STEPS = 3000
"""On 2 CPU cores a cold compile costs 9 to 22 s per process and saves some 5 ms a step."""

STATE_PART = 0.75
"""Of a GPU's memory that parameters, gradients and moments may take; the rest is for activations."""


@dataclass(frozen=True)
class Hardware:
    """The choices, to be printed."""

    device: str
    threads: int
    autocast: bool
    compile: bool
    micro_batch: int
    ranks: int = 1
    parts: int = 1
    """In how many parts the optimizer's moments are kept, one for each rank; 1: each rank has all."""
    state_bytes: int = 0
    """Of each rank while it trains, without activations; 0 where there is one rank."""
    peak_flops: float = 0.0
    """FLOP/s of all ranks at most; 0: not known."""

    def __str__(self) -> str:
        words = [self.device, f"{self.threads} thread{'s' * (self.threads > 1)}", "bf16" if self.autocast else "fp32"]
        words += [f"micro-batch {self.micro_batch}"] * (self.device_type == "cuda")
        words += ["compiled"] * self.compile + [f"{self.ranks} ranks"] * (self.ranks > 1)
        words += [f"moments in {self.parts} parts"] * (self.parts > 1)
        words += [f"{self.state_bytes / 1e9:.3g} GB a rank"] * (self.device_type == "cuda" and self.ranks > 1)
        return ", ".join(words)

    @property
    def shard(self) -> str:
        """What the other ranks are told, who may see another GPU: always or never, as `resources.shard`."""
        return "always" if self.parts > 1 else "never"

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return self.device.split(":")[0]


def threads_for(job: Job, silos: int, cores: int | None = None) -> int:
    """CPU threads of each of `silos` that share a machine.

    Silos with more threads than cores between them run at a quarter of the speed (SPEED.md).
    """
    return job.inner.threads or max(1, (cores or os.cpu_count() or 1) // silos)


def compile_pays(job: Job) -> bool:
    """Whether a run is long enough to earn the compilation back, or is told to compile."""
    auto = job.inner.compile == "auto" and job.total_steps >= _COMPILE_PAYS_AFTER_STEPS
    return auto or job.inner.compile == "always"


def choose_hardware(job: Job, threads: int, gpu: bool, compile: bool, ranks: int = 1) -> Hardware:
    """The choices for a silo in this process, or for one rank of it.

    Raises:
        ClusterError: a GPU is asked for, and this process sees none.
    """
    if gpu and not torch.cuda.is_available():
        raise ClusterError(
            "resources.num_gpus is above 0, but this process sees no CUDA GPU: set it to 0 to train on the CPU"
        )
    device = "cuda" if gpu else "cpu"
    autocast = job.inner.precision == "bf16" or (job.inner.precision == "auto" and _has_bf16(device))
    rows = job.inner.batch_size // ranks
    micro_batch = job.inner.micro_batch or (rows if device == "cpu" else _divisor(rows, 16))
    peak = ranks * peak_flops(torch.cuda.get_device_name()) if gpu and autocast else 0.0
    return Hardware(device, threads, autocast, compile, micro_batch, ranks, peak_flops=peak)


def choose_parts(hardware: Hardware, job: Job, shard: str, parameters: int) -> Hardware:
    """The same, and whether the moments of a silo of several ranks are kept in parts.

    Args:
        hardware: as chosen so far.
        job: whose optimizer it is: Muon has no parts (the job refuses to be told otherwise).
        shard: auto, never or always, as `resources.shard`.
        parameters: of the silo's model.
    """
    if hardware.ranks == 1:
        return hardware
    whole, divided = (state_bytes(parameters, hardware.autocast, parts) for parts in (1, hardware.ranks))
    full = hardware.device_type == "cuda" and whole > STATE_PART * torch.cuda.mem_get_info()[1]
    if job.inner.optimizer == "adamw" and (shard == "always" or (shard == "auto" and full)):
        return replace(hardware, parts=hardware.ranks, state_bytes=divided)
    return replace(hardware, state_bytes=whole)


def state_bytes(parameters: int, autocast: bool, parts: int) -> int:
    """Of a rank: weights and gradient, their cast to bf16, and its part of AdamW's two moments.

    >>> state_bytes(1_000, autocast=True, parts=1), state_bytes(1_000, autocast=True, parts=8)
    (18000, 11000)
    """
    return parameters * (4 + 4 + 2 * autocast) + 8 * parameters // parts


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    # On processors without these instructions bf16 is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
