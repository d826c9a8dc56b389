"""What a silo runs on, and every choice that follows from it, in one place (SPEED.md): device, threads, precision,
compilation.

Chosen from the job as the run began and from the machine, never from how far it is or what people changed since, so
that a resumed run makes the same choices and therefore the same bits. Attention and the loss choose for themselves, by
device and size (`attention`, `loss`).
"""

import math
import os
from dataclasses import dataclass, replace

import torch

from dept_ray.config import Job
from dept_ray.errors import ClusterError, SiloError
from dept_ray.silo.flops import peak_flops
from dept_ray.silo.model import Sizes

_COMPILE_PAYS_AFTER_STEPS = 3000
"""On 2 CPU cores a cold compile costs 9 to 22 s per process and saves some 5 ms a step."""

_CUT = {"moments": "moments", "all": "model"}
"""What each rank has a part of, in a word, by `resources.shard`."""

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
    shard: str = "never"
    """What is cut among the ranks, as `resources.shard`: never (nothing), moments or all."""
    state_bytes: int = 0
    """Of each rank while it trains, without activations; 0 where there is one rank."""
    peak_flops: float = 0.0
    """FLOP/s of all ranks at most; 0: not known."""

    def __str__(self) -> str:
        words = [self.device, f"{self.threads} thread{'s' * (self.threads > 1)}", "bf16" if self.autocast else "fp32"]
        words += [f"micro-batch {self.micro_batch}"] * (self.device_type == "cuda")
        words += ["compiled"] * self.compile + [f"{self.ranks} ranks"] * (self.ranks > 1)
        words += [f"{_CUT.get(self.shard)} in {self.parts} parts"] * (self.parts > 1)
        words += [f"{self.state_bytes / 1e9:.3g} GB a rank"] * (self.device_type == "cuda" and self.ranks > 1)
        return ", ".join(words)

    @property
    def parts(self) -> int:
        """In how many parts the optimizer's moments are kept, one for each rank; 1: each rank has all."""
        return 1 if self.shard == "never" else self.ranks

    @property
    def home(self) -> str:
        """Where rank 0 keeps the whole model between two orders: the host, where a GPU may have no room for it."""
        return "cpu" if self.shard == "all" else self.device

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


def choose_shard(hardware: Hardware, job: Job, shard: str, sizes: Sizes) -> Hardware:
    """The same, and what is cut among the ranks of a silo that has several.

    Args:
        hardware: as chosen so far.
        job: whose optimizer it is: under Muon nothing is cut (the job refuses to be told otherwise).
        shard: auto, never, moments or all, as `resources.shard`. auto: the first of the others with which a GPU has
            room for activations, or the last; never on a CPU.
        sizes: of the silo's model.

    Raises:
        SiloError: all is cut on GPUs, and the job does not say how many sequences they take at once.
    """
    if hardware.ranks == 1:
        return hardware
    ways = {way: state_bytes(sizes, hardware.autocast, way, hardware.ranks) for way in ("never", *_CUT)}
    if shard == "auto":
        limit = STATE_PART * torch.cuda.mem_get_info()[1] if hardware.device_type == "cuda" else math.inf
        may = ways if job.inner.optimizer == "adamw" else ("never",)
        shard = next((way for way in may if ways[way] <= limit), tuple(may)[-1])
    if shard == "all" and hardware.device_type == "cuda" and job.inner.micro_batch is None:
        raise SiloError(
            "its GPUs have no room for its model, which is cut among them: set inner.micro_batch, 1 to begin with, for "
            "it is not found out by trying there"
        )
    return replace(hardware, shard=shard, state_bytes=ways[shard])


def state_bytes(sizes: Sizes, autocast: bool, shard: str, ranks: int) -> int:
    """Of a rank: weights and gradient, their cast to bf16, and AdamW's two moments, or its part of what is cut.

    Where all is cut, the embedding is whole during a pass, with its gradient; of the body a block, which is left out.

    >>> sizes = Sizes(body=800, tokens=160, positions=40)
    >>> [state_bytes(sizes, autocast=True, shard=shard, ranks=8) for shard in ("never", "moments", "all")]
    [18000, 11000, 3600]
    """
    if shard == "all":
        return 16 * sizes.total // ranks + 8 * (sizes.tokens + sizes.positions)
    return sizes.total * (4 + 4 + 2 * autocast) + 8 * sizes.total // (ranks if shard == "moments" else 1)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    # On processors without these instructions bf16 is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
