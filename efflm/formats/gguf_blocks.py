"""Weights as the blocks of GGUF's types: integers are written as they are, only their scales become float16.

The layouts are those of ggml's ggml-common.h. Written are the types whose grids ops.Format has, where a group of ours
is a whole number of their blocks; the scales of the parts of a K block, which have 6 bits, are then all one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.formats import gguf_file
from efflm.model import require_fits
from efflm.ops import QArray, dequantize
from efflm.ops.packing import unpack
from efflm.ops.qarray import scales, zero_points

ROUNDED_TO = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # what any matrix can be written as
FLOATS = {jnp.dtype(jnp.float32): "F32", jnp.dtype(jnp.float16): "F16", jnp.dtype(jnp.bfloat16): "BF16"}
NUMPY = {kind: dtype for dtype, kind in FLOATS.items()}


def kind_of(weight: Any, transposed: bool, masked: bool) -> str | None:
    """The type with just the numbers of a weight; None where there is none. transposed: whether the rows in the file
    are columns here. masked: whether its zeros must stay zeros."""
    if not isinstance(weight, QArray):
        return FLOATS.get(getattr(weight, "dtype", None)) if len(weight.shape) > 1 else "F32"
    if transposed != (weight.axis == -2) or weight.size % 32 or weight.group % 32:
        return None
    super_blocks = weight.size % 256 == 0 and weight.group % 256 == 0
    bits, points = weight.bits, weight.zeros is not None
    if super_blocks and (bits, points) in ((2, False), (2, True), (3, False), (4, True)):
        return f"Q{bits}_K"
    if points and bits in (4, 5) and not masked:
        return f"Q{bits}_1"  # which rounds what it adds, so that no code of it need be zero
    needed = bits + points  # for codes less their zero points
    if needed > 8:
        return None
    return "Q4_0" if needed <= 4 else "Q5_0" if needed == 5 else "Q8_0"


def blocks_of(name: str, weight: Any, kind: str, transposed: bool, exact: bool) -> np.ndarray:
    """A weight as uint8 [rows, bytes of a row]; a vector as one row. exact: the kind is the one of `kind_of`; otherwise
    the numbers are rounded to it. Raises InputError for numbers that do not fit the kind."""
    if exact and isinstance(weight, QArray):
        return _packed(name, weight, kind)
    values = trees.on_host(dequantize(weight))
    values = np.ascontiguousarray(values.T if transposed else values)
    values = values.reshape(-1, values.shape[-1])
    if kind in NUMPY:
        with np.errstate(over="ignore"):
            stored = values.astype(NUMPY[kind])
        require_fits(name, values, stored)
        return stored.view(np.uint8)
    return gguf_file.rounded(values.astype(np.float32), kind)


def _packed(name: str, weight: QArray, kind: str) -> np.ndarray:
    turned = lambda x: trees.on_host(x).T if weight.axis == -2 else trees.on_host(x)
    codes_NK = turned(unpack(trees.on_host(weight.values), weight.bits, weight.size, weight.axis)).astype(np.int16)
    scale_NG, zeros_NG = turned(scales(weight)), None if weight.zeros is None else turned(zero_points(weight))
    size, _ = gguf_file.SIZES[kind]
    rows, count = len(codes_NK), weight.size // size

    def each(per_group: np.ndarray) -> np.ndarray:
        """[rows, blocks], from one for each group."""
        if not weight.group:
            return np.broadcast_to(per_group, (rows, count))
        return np.repeat(per_group, weight.group // size, axis=1)[:, :count]

    with np.errstate(over="ignore"):
        halves = scale_NG.astype(np.float16)
    require_fits(f"the scale of {name}", scale_NG, halves)
    codes = codes_NK.reshape(rows, count, size)
    scale = each(halves)
    zeros = np.zeros_like(scale, np.int16) if zeros_NG is None else each(zeros_NG).astype(np.int16)
    made = _LAYOUTS[kind](codes, scale, zeros)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in made], axis=-1).reshape(rows, -1)


# Each: (codes [rows, blocks, size], scale float16 [rows, blocks], zeros [rows, blocks]) -> the parts of a block.


def _q8_0(codes, scale, zeros):
    return scale[..., None], (codes - zeros[..., None]).astype(np.int8)


def _q4_0(codes, scale, zeros):
    return scale[..., None], _nibbles(codes - zeros[..., None] + 8)


def _q4_1(codes, scale, zeros):
    least = -(zeros + 8).astype(np.float32) * scale.astype(np.float32)
    return scale[..., None], least.astype(np.float16)[..., None], _nibbles(codes + 8)


def _q5_1(codes, scale, zeros):
    least = -(zeros + 16).astype(np.float32) * scale.astype(np.float32)
    numbers = codes + 16
    high = np.packbits(numbers >= 16, axis=-1, bitorder="little")
    return scale[..., None], least.astype(np.float16)[..., None], high, _nibbles(numbers & 15)


def _q5_0(codes, scale, zeros):
    numbers = codes - zeros[..., None] + 16
    return scale[..., None], np.packbits(numbers >= 16, axis=-1, bitorder="little"), _nibbles(numbers & 15)


def _q4_k(codes, scale, zeros):
    """Eight parts of 32: their scales are 1, what each takes off is its zero point times the scale of that, `scale`."""
    one, zero = np.ones((*zeros.shape, 4), np.uint8), np.repeat((zeros + 8).astype(np.uint8)[..., None], 4, axis=-1)
    pairs = (codes + 8).astype(np.uint8).reshape(*codes.shape[:-1], 4, 2, 32)
    quanta = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*zeros.shape, 128)
    return scale[..., None], scale[..., None], one, zero, one | zero << 4, quanta


def _q3_k(codes, scale, zeros):
    """Sixteen parts of 16, whose scales are 33 - 32. The highest of three bits says that 4 is not taken off."""
    numbers = (codes + 4).astype(np.uint8).reshape(*scale.shape, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    low = np.bitwise_or.reduce((numbers & 3) << shifts, axis=-2).reshape(*scale.shape, 64)
    high = np.packbits(numbers.reshape(*scale.shape, 8, 32) >> 2, axis=-2, bitorder="little")[..., 0, :]
    parts = np.broadcast_to(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (*scale.shape, 12))
    return high, low, parts, scale[..., None]


def _q2_k(codes, scale, zeros):
    """Sixteen parts of 16: their scales are 1, what each takes off is its zero point, from 0 to 3."""
    part = np.repeat((1 | zeros + 2 << 4).astype(np.uint8)[..., None], 16, axis=-1)
    numbers = (codes + 2).astype(np.uint8).reshape(*scale.shape, 2, 4, 32)
    low = np.bitwise_or.reduce(numbers << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
    return part, low.reshape(*scale.shape, 64), scale[..., None], scale[..., None]


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 15 in 16 bytes: the first half of a block in the low bits."""
    numbers = numbers.astype(np.uint8)
    return numbers[..., :16] | numbers[..., 16:] << 4


_LAYOUTS = {"Q8_0": _q8_0, "Q5_1": _q5_1, "Q5_0": _q5_0, "Q4_1": _q4_1, "Q4_0": _q4_0}
_LAYOUTS |= {"Q4_K": _q4_k, "Q3_K": _q3_k, "Q2_K": _q2_k}
