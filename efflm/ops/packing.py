"""Codes of fewer than 8 bits in bytes: the first code in the lowest bits, and no bit left between two."""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np


def unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes take."""
    codes, nbytes = unit(bits)
    return -(-size // codes) * nbytes


def pack(codes: Any, bits: int, axis: int = -1) -> Any:
    """int8 codes -> uint8, the axis as long as `packed_size` says; numpy for numpy. 8 bits are left as they are."""
    if bits == 8:
        return codes
    xp, (count, _) = _namespace(codes), unit(bits)
    last = xp.moveaxis(codes, axis, -1)
    last = xp.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, -last.shape[-1] % count)])
    return xp.moveaxis(regrouped(last.astype(np.uint8) & (2**bits - 1), bits, 8), -1, axis)


def unpack(packed: Any, bits: int, size: int, axis: int = -1) -> Any:
    """The inverse of `pack`: `size` int8 codes along the axis."""
    if bits == 8:
        return packed
    xp = _namespace(packed)
    fields = regrouped(xp.moveaxis(packed, axis, -1), 8, bits)[..., :size].astype(np.int8)
    half = np.int8(2 ** (bits - 1))
    return xp.moveaxis((fields ^ half) - half, -1, axis)  # the highest bit is that of the sign


def regrouped(fields: Any, width: int, into: int) -> Any:
    """Numbers of `width` bits along the last axis, uint8, as numbers of `into` bits that hold the same bits, uint8.

    Widths are at most 8; the axis is a whole number of the shortest runs of both.
    """
    count = math.lcm(width, into) // width
    runs = fields.reshape(*fields.shape[:-1], -1, count).astype(np.uint16)

    def shifted(j: int, k: int) -> Any:
        """The bits of number j of a run that belong to number k, and some beyond them."""
        by = width * j - into * k
        return runs[..., j] << np.uint16(by) if by >= 0 else runs[..., j] >> np.uint16(-by)

    def number(k: int) -> Any:
        parts = range(into * k // width, -(-into * (k + 1) // width))
        return functools.reduce(operator.or_, (shifted(j, k) for j in parts)) & np.uint16(2**into - 1)

    made = _namespace(fields).stack([number(k) for k in range(count * width // into)], axis=-1)
    return made.astype(np.uint8).reshape(*fields.shape[:-1], -1)


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
