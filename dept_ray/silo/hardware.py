"""What a silo runs on, and every choice that follows from it, in one place (SPEED.md): device, threads, precision,
compilation.

Chosen from the job as the run began and from the machine, never from how far it is or what people changed since, so
that a resumed run makes the same choices and therefore the same bits. Attention and the loss choose for themselves, by
device and size (`attention`, `loss`).
"""

import os
from dataclasses import dataclass

import torch

from dept_ray.config import Job
from dept_ray.errors import ClusterError
from dept_ray.silo.flops import peak_flops

_COMPILE_PAYS_AFTER_STEPS = 3000
"""On 2 CPU cores a cold compile costs 9 to 22 s per process and saves some 5 ms a step."""


@dataclass(frozen=True)
class Hardware:
    """The choices, to be printed."""

    device: str
    threads: int
    autocast: bool
    compile: bool
    micro_batch: int
    ranks: int = 1
    peak_flops: float = 0.0
    """FLOP/s of all ranks at most; 0: not known."""

    def __str__(self) -> str:
        words = [self.device, f"{self.threads} thread{'s' * (self.threads > 1)}", "bf16" if self.autocast else "fp32"]
        words += [f"micro-batch {self.micro_batch}"] * (self.device_type == "cuda")
        return ", ".join(words + ["compiled"] * self.compile + [f"{self.ranks} ranks"] * (self.ranks > 1))

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
    return Hardware(device, threads, autocast, compile, micro_batch, ranks, peak)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    # On processors without these instructions bf16 is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
