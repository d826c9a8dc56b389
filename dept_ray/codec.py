"""What a vector looks like on the wire: fp32, bf16, int8 or int4, with one scale per block of 64 values.

    int4, int8   scale = max |x| / 7 (127) of the block, rounded to bf16; code = round(x / scale)
    bf16         rounded to the nearest, ties to even
    fp32         as it is: a plain array, never a `Coded`
    int4-zstd    as int4, then packed: few codes are near the largest, so that entropy coding saves an eighth

4.25, 8.25, 16, 32 and, as deltas are, some 3.7 bits a value. What rounding leaves is the sender's *residual*, which it
adds to what it sends next (error feedback, Karimireddy et al., arXiv 1901.09847): nothing is lost, it is late. Rows are
coded one by one, so that some of them can be sent alone. Elementwise IEEE operations only: every machine decodes the
same bits.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

CodecName = Literal["fp32", "bf16", "int8", "int4", "int4-zstd"]
PACKED = {"int4-zstd": "int4"}
"""What is within."""
PACKED_BITS = 3.7
"""Of a value, as measured: 3.72 to 3.67 after 100 to 500 steps. After few, which all moved alike, up to 4.0."""
BLOCK = 64
"""Values that share a scale."""
_LARGEST = {"int8": 127, "int4": 7}
_CHUNK = 1 << 18
"""Values coded at a time: the temporaries stay in cache."""


@dataclass(frozen=True)
class Coded:
    """A vector (n,) or rows (R, D), coded."""

    codec: str
    shape: tuple[int, ...]
    codes: np.ndarray
    """(R, values or bytes a row): uint16 (the upper half of fp32), int8, or uint8 with two values each, low half first.
    Rows are padded with zeros to whole blocks; a vector is one row. Packed: (bytes,) uint8, the scales' within."""
    scales: np.ndarray | None = None
    """(R, blocks) uint16, the bits of bf16; None under bf16, and where all is packed."""

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def opened(self) -> "Coded":
        """The same, to be computed with: unpacked, where it travels packed.

        Raises:
            ValueError: that was damaged, or is of another length.
        """
        return self if self.codec not in PACKED else _unpacked(self)

    def rows(self, which: np.ndarray | slice) -> "Coded":
        """Some of the rows, still coded."""
        if self.codec in PACKED:
            return _packed(self.codec, self.opened().rows(which))
        codes = self.codes[which]
        scales = None if self.scales is None else self.scales[which]
        return Coded(self.codec, (len(codes), *self.shape[1:]), codes, scales)

    def misfit(self, codec: str, shape: tuple[int, ...]) -> str | None:
        """Why this is not what was asked for; None if it is."""
        if (self.codec, self.shape) != (codec, shape):
            return f"{self.codec} {self.shape}, asked was {codec} {shape}"
        if codec in PACKED:
            try:
                return self.opened().misfit(PACKED[codec], shape)
            except ValueError as err:
                return str(err)
        form = _form(codec, shape)
        mine = (self.codes.dtype, self.codes.shape, None if self.scales is None else self.scales.shape)
        if mine != form or (self.scales is not None and self.scales.dtype != np.uint16):
            return f"coded as {mine}, a {codec} vector is {form}"
        exponents = self.codes if self.scales is None else self.scales
        return "not finite" if ((exponents & 0x7F80) == 0x7F80).any() else None

    def decode(self) -> np.ndarray:
        """fp32 of `shape`."""
        out = np.empty(self.shape, np.float32)
        self._onto(out, add=False)
        return out

    def add_to(self, vector: np.ndarray) -> None:
        """vector += what is coded, in place, in fp32.

        Args:
            vector: contiguous fp32 of `shape`.
        """
        self._onto(vector, add=True)

    def piece(self, start: int, stop: int) -> np.ndarray:
        """fp32 of some values of a flat vector, which is not packed; `start` is a multiple of `BLOCK`."""
        return self._values(slice(0, 1), slice(start, min(stop, self.shape[0])))[0].numpy()

    def _onto(self, vector: np.ndarray, add: bool) -> None:
        import torch

        (count, width), opened = _rows_of(self.shape), self.opened()
        flat = torch.from_numpy(vector.reshape(count, width))
        for rows, columns in _pieces(count, width):
            target, values = flat[rows, columns], opened._values(rows, columns)
            target.add_(values) if add else target.copy_(values)

    def _values(self, rows: slice, columns: slice) -> "torch.Tensor":
        if self.scales is None:
            return _bf16(self.codes[rows, columns])
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        values = _unpack(self.codec, self.codes, rows, blocks)
        return (values * _bf16(self.scales[rows, blocks])[:, :, None]).flatten(1)[:, : columns.stop - columns.start]


@dataclass(frozen=True)
class Moves:
    """How to come from the vector after one round to that after a later one: the coded steps between."""

    shape: tuple[int, ...]
    base: int
    """The round after which the receiver holds the vector."""
    steps: tuple[Coded, ...]

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return sum(step.nbytes for step in self.steps)

    def apply(self, vector: np.ndarray) -> None:
        """Make them, in place: contiguous fp32 of `shape`."""
        for step in self.steps:
            step.add_to(vector)


def decoded(vector: "np.ndarray | Coded") -> np.ndarray:
    """fp32 of what may be coded."""
    return vector.decode() if isinstance(vector, Coded) else vector


def finite_norm(delta: np.ndarray | Coded) -> float:
    """L2 to 1e-6, however long it is; nan where a value is not finite, infinite where fp32 cannot square one.

    >>> finite_norm(np.float32([3, 4])), finite_norm(np.float32([3, np.inf]))
    (5.0, nan)
    """
    flat = decoded(delta).ravel()

    def squares(part: np.ndarray) -> float:
        """A piece at a time: an fp32 sum of 80M squares loses a thousandth of them."""
        pieces = (part[start : start + _CHUNK] for start in range(0, len(part), _CHUNK))
        with np.errstate(over="ignore", invalid="ignore"):
            return sum(float(np.dot(piece, piece)) for piece in pieces)

    with ThreadPoolExecutor(2) as pool:  # the last delta's is waited for by all
        norm = math.sqrt(sum(pool.map(squares, np.array_split(flat, 2))))
    return norm if math.isfinite(norm) or np.isfinite(flat).all() else math.nan


def encode(vector: np.ndarray, codec: str) -> tuple[Coded, np.ndarray]:
    """Code a vector.

    Args:
        vector: (n,) or (R, D) fp32, contiguous.
        codec: bf16, int8, int4 or int4-zstd.

    Returns:
        The coded vector, and what it lacks (`vector` minus what decodes from it): the residual, fp32 of the same shape.
    """
    import torch

    if codec in PACKED:
        coded, residual = encode(vector, PACKED[codec])
        return _packed(codec, coded), residual
    count, width = _rows_of(vector.shape)
    dtype, shape, scales_shape = _form(codec, vector.shape)
    codes = np.zeros(shape, dtype)
    scales = None if scales_shape is None else np.zeros(scales_shape, np.uint16)
    residual = vector.copy()
    source, rest = (torch.from_numpy(each.reshape(count, width)) for each in (vector, residual))
    for rows, columns in _pieces(count, width):
        x = source[rows, columns]
        if scales is None:
            rounded = x.to(torch.bfloat16)
            codes[rows, columns] = rounded.view(torch.int16).numpy().view(np.uint16)
            rest[rows, columns] -= rounded.float()
            continue
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scale = (x.abs().amax(-1, keepdim=True) / _LARGEST[codec]).to(torch.bfloat16)
        scales[rows, blocks] = scale.squeeze(-1).view(torch.int16).numpy().view(np.uint16)
        scale = scale.float()
        # Of nothing but zeros 0 / 0 would be no number; what is no number must stay none, to be refused.
        q = (x / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-_LARGEST[codec], _LARGEST[codec])
        _pack(codec, codes, rows, blocks, q)
        rest[rows, columns] -= (q * scale).flatten(1)[:, : columns.stop - columns.start]
    return Coded(codec, tuple(vector.shape), codes, scales), residual


def coded_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of a vector of that shape on the wire; where they are packed, about as many.

    >>> [coded_bytes(codec, (1024,)) for codec in ("fp32", "bf16", "int8", "int4")]
    [4096, 2048, 1056, 544]
    """
    if codec == "fp32":
        return 4 * int(np.prod(shape))
    if codec in PACKED:
        return round(PACKED_BITS / 8 * int(np.prod(shape)))
    dtype, codes, scales = _form(codec, shape)
    return np.dtype(dtype).itemsize * int(np.prod(codes)) + (0 if scales is None else 2 * int(np.prod(scales)))


def _packed(codec: str, coded: Coded) -> Coded:
    """By zstd's fastest level, whose Huffman codes are all that there is to gain: nothing in it repeats."""
    import pyarrow as pa

    assert coded.scales is not None
    whole = np.concatenate([coded.codes.ravel(), coded.scales.ravel().view(np.uint8)])
    packed = pa.Codec("zstd", compression_level=1).compress(whole)
    return Coded(codec, coded.shape, np.frombuffer(packed, np.uint8))


def _unpacked(packed: Coded) -> Coded:
    import pyarrow as pa

    inner = PACKED[packed.codec]
    _, codes_shape, scales_shape = _form(inner, packed.shape)
    assert scales_shape is not None
    codes = math.prod(codes_shape)
    try:
        whole = pa.Codec("zstd").decompress(packed.codes, decompressed_size=codes + 2 * math.prod(scales_shape))
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(f"what is packed cannot be unpacked ({err})") from None
    flat = np.frombuffer(whole, np.uint8)
    return Coded(
        inner, packed.shape, flat[:codes].reshape(codes_shape), flat[codes:].view(np.uint16).reshape(scales_shape)
    )


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _form(codec: str, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, int], tuple[int, int] | None]:
    """What a coded vector is made of: type and shape of its codes, shape of its scales."""
    count, width = _rows_of(shape)
    if codec == "bf16":
        return np.dtype(np.uint16), (count, width), None
    blocks = -(-width // BLOCK)
    per_row = blocks * BLOCK if codec == "int8" else blocks * BLOCK // 2
    return np.dtype(np.int8 if codec == "int8" else np.uint8), (count, per_row), (count, blocks)


def _pieces(count: int, width: int) -> list[tuple[slice, slice]]:
    """Rows by columns, some `_CHUNK` values each, cut between blocks."""
    if width >= _CHUNK:
        cuts = range(0, width, _CHUNK)
        return [(slice(r, r + 1), slice(c, min(c + _CHUNK, width))) for r in range(count) for c in cuts]
    step = max(1, _CHUNK // max(width, 1))
    return [(slice(r, min(r + step, count)), slice(0, width)) for r in range(0, count, step)]


def _pack(codec: str, codes: np.ndarray, rows: slice, blocks: slice, q: "torch.Tensor") -> None:
    """Write (rows, blocks, 64) whole numbers to their place."""
    import torch

    flat = q.flatten(1)
    if codec == "int8":
        codes[rows, blocks.start * BLOCK : blocks.stop * BLOCK] = flat.to(torch.int8).numpy()
        return
    nibbles = flat.to(torch.int8).view(torch.uint8) & 0xF
    both = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    codes[rows, blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2] = both.numpy()


def _bf16(bits: np.ndarray) -> "torch.Tensor":
    """fp32 of a few bf16 values. Copied: what came over the wire may only be read, which torch warns of."""
    import torch

    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()


def _unpack(codec: str, codes: np.ndarray, rows: slice, blocks: slice) -> "torch.Tensor":
    """The inverse of `_pack`: (rows, blocks, 64) fp32."""
    import torch

    bytes_a_block = BLOCK if codec == "int8" else BLOCK // 2
    packed = codes[rows, blocks.start * bytes_a_block : blocks.stop * bytes_a_block]
    both = torch.from_numpy(packed.view(np.int8).copy())
    if codec == "int8":
        return both.float().unflatten(1, (-1, BLOCK))
    low, high = (both << 4) >> 4, both >> 4  # arithmetic shifts: the sign comes along
    return torch.stack([low, high], dim=-1).flatten(1).float().unflatten(1, (-1, BLOCK))
