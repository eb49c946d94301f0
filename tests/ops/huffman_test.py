"""Entropy-coded arrays: they come back, are near their entropy, and what is damaged or claims too much is refused."""

import tracemalloc
import zlib

import ml_dtypes
import numpy as np
import pytest

from efflm.config import InputError
from efflm.ops import huffman
from efflm.ops.packing import pack

UINT8 = np.dtype(np.uint8)


def entropy(symbols: np.ndarray) -> float:
    """Bits of a symbol, by how often each occurs."""
    shares = np.unique(symbols, return_counts=True)[1] / symbols.size
    return -np.sum(shares * np.log2(shares))


def rounded(bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes of normal weights in groups of 32, of which the largest magnitude is the lowest code."""
    weights = np.random.default_rng(bits).standard_normal((*shape[:-1], shape[-1] // 32, 32))
    most = np.take_along_axis(weights, np.abs(weights).argmax(-1)[..., None], -1)
    low = -(2 ** (bits - 1))
    return np.clip(np.round(low * weights / most), low, -low - 1).astype(np.int8).reshape(shape)


@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_come_back_and_take_their_entropy_to_a_percent(bits, axis):
    codes = rounded(bits, (1024, 512))
    packed = pack(codes, bits, axis)
    along = (axis, bits) if huffman.in_parts(bits) else None
    coded = huffman.encode(packed, along)
    back = huffman.decode(coded, packed.dtype, packed.shape, along)
    assert back.dtype == packed.dtype
    np.testing.assert_array_equal(back, packed)
    assert 1 <= 8 * coded.size / codes.size / entropy(codes) < 1.01


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_come_back_and_only_their_exponents_are_coded(dtype):
    weights = np.random.default_rng(0).standard_normal((300, 400)).astype(dtype)
    coded = huffman.encode(weights)
    back = huffman.decode(coded, weights.dtype, weights.shape)
    np.testing.assert_array_equal(back.view(np.uint8), weights.view(np.uint8))
    planes = weights.view(np.uint8).reshape(-1, weights.dtype.itemsize).T
    assert coded.size == pytest.approx(sum(map(entropy, planes)) * weights.size / 8, rel=0.01)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 5)])
def test_every_shape_comes_back(shape):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    back = huffman.decode(huffman.encode(array), array.dtype, shape)
    assert (back.dtype, back.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(back, array)


def test_what_is_damaged_or_of_another_size_is_an_error():
    array = rounded(4, (64, 64)).view(np.uint8)
    coded = huffman.encode(array)
    decode = lambda data, shape=array.shape: huffman.decode(np.frombuffer(data, np.uint8), UINT8, shape)
    np.testing.assert_array_equal(decode(coded.tobytes()), array)
    with pytest.raises(InputError, match="it ends too early"):
        decode(coded.tobytes()[:-100])
    with pytest.raises(InputError, match="more follows"):
        decode(coded.tobytes() + b"x")
    with pytest.raises(InputError, match="it ends too early"):
        decode(coded.tobytes(), (64, 65))
    with pytest.raises(InputError, match="more follows"):
        decode(coded.tobytes(), (64, 63))
    for at in range(0, coded.size, 37):
        broken = bytearray(coded)
        broken[at] ^= 16
        with pytest.raises(InputError, match="damaged"):
            decode(bytes(broken))


def test_what_claims_more_than_it_can_stand_for_is_refused_before_it_is_read():
    zeros = np.zeros((1000, 1000), np.uint8)
    coded = huffman.encode(zeros)
    assert zeros.size <= huffman.MOST * coded.size
    bomb = np.frombuffer(zlib.compress(bytes(10**8)), np.uint8)  # of repetitions, as this module never makes it
    tracemalloc.start()
    with pytest.raises(InputError, match="cannot stand for 100000000"):
        huffman.decode(bomb, UINT8, (10**8,))
    with pytest.raises(InputError, match="more follows"):
        huffman.decode(bomb, UINT8, (10,))
    with pytest.raises(InputError, match="cannot stand for"):
        huffman.decode(coded, UINT8, (1 << 60, 3 << 60))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
