"""How many sequences a GPU takes at once, where the job leaves it open: a few are tried, the rest is a straight line.

The memory of a forward and backward pass grows by the same amount with each sequence, once the loss has more rows than
one of its chunks holds. Tried once, when the silo is made, before the optimizer has its moments: room for them is kept.
What is found hangs on what is free: set `inner.micro_batch` where two starts must sum in the same order.
"""

from collections.abc import Mapping, Sequence

import torch

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.loss import CHUNK_ROWS
from dept_ray.silo.model import LanguageModel

FILL = 0.9
"""Share of the free memory to be used: the allocator leaves gaps."""


def fitting(peaks: Mapping[int, int], share: int, free: int, later: int) -> int:
    """The largest number of sequences that divides a rank's share of a batch and fits.

    Args:
        peaks: bytes at the peak, by sequences tried; a line through the two largest goes on from there.
        share: sequences of a batch that a rank takes.
        free: bytes that may be used in all.
        later: bytes that will be used besides.

    >>> fitting({1: 3_000, 2: 4_000}, share=64, free=20_000, later=1_000)  # 2,000 + 1,000 each, in 17,000
    8
    >>> fitting({1: 3_000, 2: 4_000}, share=12, free=20_000, later=1_000)
    12
    >>> fitting({1: 3_000}, share=64, free=4_000, later=2_000)  # it went well once
    1
    """
    tried = sorted(peaks)
    first, last = tried[-2:][0], tried[-1]
    each = max(1, (peaks[last] - peaks[first]) // max(1, last - first))
    most = last + (int(FILL * free) - later - peaks[last]) // each if last > first else last
    return max((d for d in range(1, share + 1) if share % d == 0 and d <= most), default=1)


def counts_to_try(share: int, context: int) -> list[int]:
    """1, 2, 4, ... sequences, until the loss has seen two of its chunks.

    >>> counts_to_try(256, 2048)
    [1, 2, 4]
    >>> counts_to_try(3, 128)
    [1, 2]
    """
    enough = 2 * CHUNK_ROWS["cuda"]
    counts = [1]
    while 2 * counts[-1] <= share and counts[-1] * context < enough:
        counts.append(2 * counts[-1])
    return counts


def find_micro_batch(
    model: LanguageModel, tensors: Sequence[torch.Tensor], job: Job, hardware: Hardware, part: float
) -> int:
    """Try a few passes on this process's GPU; gradients are left at zero.

    Args:
        model: to be trained.
        tensors: its parameters, as the optimizer steps them, with their gradients.
        job: whose batches and context are in force.
        hardware: precision, ranks, and in how many parts moments are kept.
        part: of the GPU's memory that may be used, where silos share one.

    Raises:
        SiloError: not even one sequence fits.
    """
    share, peaks = job.inner.batch_size // hardware.ranks, dict[int, int]()
    for count in counts_to_try(share, job.inner.context):
        torch.cuda.reset_peak_memory_stats()
        ids = torch.zeros((count, job.inner.context), dtype=torch.int64, device=hardware.device)
        try:
            with torch.autocast(hardware.device_type, torch.bfloat16, enabled=hardware.autocast):
                model.loss(ids, ids).backward()  # as it is: compiled, each count would be compiled anew
        except torch.OutOfMemoryError:
            break
        peaks[count] = torch.cuda.max_memory_allocated()
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.zero_()
    torch.cuda.empty_cache()
    if not peaks:
        raise SiloError(
            "its GPU has no room for one sequence: set inner.checkpoint_activations = true, lower inner.context, or "
            "give it a larger part of one (resources.num_gpus)"
        )
    free, total = torch.cuda.mem_get_info()
    usable = min(free + torch.cuda.memory_reserved(), int(part * total))
    moments = 2 * sum(tensor.nbytes for tensor in tensors) // hardware.parts
    return fitting(peaks, share, usable, later=moments)
