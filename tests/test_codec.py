"""What a vector looks like on the wire: its size, its error, its rows, and what is no number stays none."""

import numpy as np
import pytest

from dept_ray.codec import BLOCK, Coded, Moves, coded_bytes, encode
from dept_ray.draws import generator

LOSSY = ["bf16", "int8", "int4"]
LARGEST = {"int8": 127, "int4": 7}
SHAPES = [(1,), (BLOCK,), (1000,), ((1 << 18) + 77,), (1, 5), (7, 96), (300, BLOCK), (2, (1 << 18) + 1), (0, 8)]


def some(shape: tuple[int, ...], scale: float = 1e-3) -> np.ndarray:
    values = generator("codec", *shape).normal(size=shape) * scale
    return values.astype(np.float32)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_decodes_and_what_it_lacks_make_the_whole(codec: str, shape: tuple[int, ...]) -> None:
    vector = some(shape)
    coded, residual = encode(vector, codec)
    assert coded.misfit(codec, shape) is None
    assert coded.nbytes == coded_bytes(codec, shape)
    np.testing.assert_array_equal(coded.decode() + residual, vector)
    base = some(shape, 1.0)
    moved = base.copy()
    coded.codes.flags.writeable = False  # as Ray delivers it
    coded.add_to(moved)
    np.testing.assert_array_equal(moved, base + coded.decode())


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(codec: str) -> None:
    vector = some((64 * BLOCK,)) * np.repeat(10.0 ** np.arange(-20, 12, 0.5), BLOCK).astype(np.float32)
    _, residual = encode(vector, codec)
    largest = np.abs(vector).reshape(-1, BLOCK).max(axis=1)
    allowed = largest / LARGEST[codec] * 0.5 * (1 + 2**-7) + largest * 2**-8  # the scale, in bf16, may be a bit short
    assert (np.abs(residual).reshape(-1, BLOCK).max(axis=1) <= allowed).all()


@pytest.mark.parametrize(("codec", "bits"), [("bf16", 16), ("int8", 8.25), ("int4", 4.25)])
def test_bits_of_a_value(codec: str, bits: float) -> None:
    assert 8 * encode(some((1 << 16,)), codec)[0].nbytes / (1 << 16) == bits


def test_codes_of_a_block_by_hand() -> None:
    vector = np.zeros(BLOCK, np.float32)
    vector[:5] = [7, -7, 3.4, -0.6, 0.5]
    coded, residual = encode(vector, "int4")
    assert coded.scales is not None
    assert coded.scales.tolist() == [[0x3F80]]  # 1.0 in bf16
    assert coded.codes[0, :3].tolist() == [0x97, 0xF3, 0x00]  # -7 and 7, -1 and 3, 0 and 0 (a half goes to the even)
    assert coded.decode()[:5].tolist() == [7, -7, 3, -1, 0]
    assert residual[4] == 0.5


@pytest.mark.parametrize("codec", LOSSY)
def test_rows_can_be_taken_while_they_are_coded(codec: str) -> None:
    rows = some((50, 96))
    coded, _ = encode(rows, codec)
    which = np.array([3, 3, 49, 0])
    part = coded.rows(which)
    assert part.misfit(codec, (4, 96)) is None
    np.testing.assert_array_equal(part.decode(), coded.decode()[which])
    np.testing.assert_array_equal(coded.rows(slice(None)).decode(), coded.decode())


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen_on_the_wire(codec: str, value: float) -> None:
    vector = some((1000,))
    vector[700] = value
    with np.errstate(invalid="ignore"):
        assert encode(vector, codec)[0].misfit(codec, (1000,)) == "not finite"


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_coded_otherwise_than_asked_is_seen(codec: str) -> None:
    coded, _ = encode(some((1000,)), codec)
    other = "int8" if codec != "int8" else "int4"
    assert "asked was" in str(coded.misfit(other, (1000,)))
    assert "asked was" in str(coded.misfit(codec, (1001,)))
    short = Coded(codec, coded.shape, coded.codes[:, :-1], coded.scales)
    assert "coded as" in str(short.misfit(codec, (1000,)))
    signed = Coded(codec, coded.shape, coded.codes.astype(np.int32), coded.scales)
    assert "coded as" in str(signed.misfit(codec, (1000,)))
    if coded.scales is not None:
        without = Coded(codec, coded.shape, coded.codes)
        assert "coded as" in str(without.misfit(codec, (1000,)))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_the_same_in_fewer_bytes(shape: tuple[int, ...]) -> None:
    vector = some(shape)
    plain, lacks = encode(vector, "int4")
    packed, residual = encode(vector, "int4-zstd")
    assert packed.misfit("int4-zstd", shape) is None
    assert "asked was" in str(packed.misfit("int4", shape))
    np.testing.assert_array_equal(packed.decode(), plain.decode())
    np.testing.assert_array_equal(residual, lacks)
    if len(shape) == 2:
        np.testing.assert_array_equal(packed.rows(slice(1, 3)).decode(), plain.decode()[1:3])
    if np.prod(shape) > 10_000:
        assert 0.8 < packed.nbytes / plain.nbytes < 0.92
        assert packed.nbytes == pytest.approx(coded_bytes("int4-zstd", shape), rel=0.05)


def test_what_was_packed_by_others_is_looked_into() -> None:
    packed, _ = encode(some((5000,)), "int4-zstd")
    for codes in (packed.codes[:-3], packed.codes[5:], encode(some((6000,)), "int4-zstd")[0].codes, packed.codes[:0]):
        assert "cannot be unpacked" in str(Coded("int4-zstd", (5000,), codes).misfit("int4-zstd", (5000,)))
    vector = some((5000,))
    vector[70] = np.inf
    assert encode(vector, "int4-zstd")[0].misfit("int4-zstd", (5000,)) == "not finite"


@pytest.mark.parametrize("codec", LOSSY)
def test_with_feedback_many_rounded_steps_are_the_sum_of_the_steps(codec: str) -> None:
    steps = [some((1000,)) * np.float32(i % 3 + 1) for i in range(50)]
    sent, residual = np.zeros(1000, np.float64), np.zeros(1000, np.float32)
    for step in steps:
        coded, residual = encode(step + residual, codec)
        sent += coded.decode()
    np.testing.assert_allclose(sent + residual, np.sum(steps, axis=0, dtype=np.float64), rtol=1e-4, atol=1e-6)


def test_moves_are_made_one_after_the_other_and_cost_what_they_hold() -> None:
    held, steps = some((500,), 1.0), [encode(some((500,)) * np.float32(i), "int4")[0] for i in (1, 2, 3)]
    moves = Moves((500,), 4, tuple(steps))
    expected = held.copy()
    for step in steps:
        expected = expected + step.decode()
    moves.apply(held)
    np.testing.assert_array_equal(held, expected)
    assert moves.nbytes == 3 * coded_bytes("int4", (500,))
    assert Moves((500,), 4, ()).nbytes == 0
