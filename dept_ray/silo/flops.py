"""What training costs in floating point operations, and what a device can do at most: their ratio is the MFU.

Counted as PaLM does (arXiv 2204.02311, appendix B): what the mathematics needs, not what was recomputed.
"""

from dept_ray.sections import ModelSection
from dept_ray.silo.model import layout_of

PEAK_TFLOPS = {
    "A10": 125, "A10G": 70, "A30": 165, "A40": 150, "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H200 NVL": 835, "H200": 989, "L4": 121, "L40": 181, "L40S": 362, "RTX 6000 Ada": 364, "B200": 2250,
}  # fmt: skip
"""Dense bf16 with fp32 sums, in TFLOP/s, by what the device's name holds; data sheets, half of those with sparsity."""


def flops_per_token(section: ModelSection, context: int, vocabulary_size: int) -> float:
    """Forward and backward of one token: 6 (body's matrices + head) + 12 layers * width * context.

    Two operations for each weight of a matrix forward and four backward; the head is one (V, D) of them, looking up the
    embedding costs nothing. Attention's two products are counted in full, though half of each is masked.

    >>> small = ModelSection(layers=4, width=256, heads=4)
    >>> flops_per_token(small, context=256, vocabulary_size=8192) / 1e6
    34.603008
    """
    matrices = layout_of(section).matrix_size  # pyright: ignore[reportArgumentType] - a frozen section has a hash
    return 6.0 * (matrices + vocabulary_size * section.width) + 12.0 * section.layers * section.width * context


def peak_flops(device_name: str) -> float:
    """Of one device, in FLOP/s; 0 where it is not known. The longest name that fits decides.

    >>> [peak_flops(name) / 1e12 for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA H100 80GB HBM3")]
    [312.0, 362.0, 989.0]
    >>> peak_flops("a device of next year")
    0.0
    """
    words = device_name.replace("-", " ").split()
    fitting = [name for name in PEAK_TFLOPS if all(word in words for word in name.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else 0.0
