"""Codes of fewer than 8 bits in bytes: the first code in the lowest bits, two in a byte or eight in three bytes."""

import math
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
    xp, (count, nbytes) = _namespace(codes), unit(bits)
    last = xp.moveaxis(codes, axis, -1)
    last = xp.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, -last.shape[-1] % count)])
    fields = (last.astype(np.uint32) & (2**bits - 1)).reshape(*last.shape[:-1], -1, count)
    words = xp.sum(fields << _shifts(bits, count, fields.ndim), axis=-1, keepdims=True, dtype=np.uint32)
    split = (words >> _shifts(8, nbytes, words.ndim)) & 255
    return xp.moveaxis(split.astype(np.uint8).reshape(*last.shape[:-1], -1), -1, axis)


def unpack(packed: Any, bits: int, size: int, axis: int = -1) -> Any:
    """The inverse of `pack`: `size` int8 codes along the axis."""
    if bits == 8:
        return packed
    xp, (count, nbytes) = _namespace(packed), unit(bits)
    last = xp.moveaxis(packed, axis, -1).astype(np.uint32)
    split = last.reshape(*last.shape[:-1], -1, nbytes)
    words = xp.sum(split << _shifts(8, nbytes, split.ndim), axis=-1, keepdims=True, dtype=np.uint32)
    fields = ((words >> _shifts(bits, count, words.ndim)) & (2**bits - 1)).astype(np.int32)
    signed = xp.where(fields >= 2 ** (bits - 1), fields - 2**bits, fields)
    return xp.moveaxis(signed.astype(np.int8).reshape(*last.shape[:-1], -1)[..., :size], -1, axis)


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _shifts(bits: int, count: int, ndim: int) -> np.ndarray:
    return (bits * np.arange(count, dtype=np.uint32)).reshape((1,) * (ndim - 1) + (-1,))
