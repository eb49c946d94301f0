"""Arrays entropy-coded for files: Huffman codes of their bytes, by zlib.

The bytes are those that arrays are stored in, with two or four codes of fewer than 8 bits in each: a Huffman code has
whole bits, which costs little where a byte holds several codes. Codes of 3 bits, of which bytes hold parts, are coded
two in a byte. Of floats the first bytes of all are coded together, then the second ones, and so on.

zlib is asked for Huffman codes alone, made anew for about every 32 KB. It could also look for repetitions; rounded
weights have none, and what looks like them costs up to a third where the codes are few. Every byte takes a bit at
least, so that what is coded stands for at most MOST times as many bytes, and a reader can refuse what claims more.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from efflm.config import require

MOST = 8


def encode(array: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The coded array, uint8 [n]. axis: that of packed codes of 3 bits, None for all else."""
    array = array if axis is None else _in_pairs(np.moveaxis(array, axis, -1))
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
    coder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    parts = [coder.compress(np.ascontiguousarray(plane)) + coder.flush(zlib.Z_FULL_FLUSH) for plane in planes]
    return np.frombuffer(b"".join([*parts, coder.flush()]), np.uint8)


def decode(coded: np.ndarray, dtype: np.dtype, shape: Sequence[int], axis: int | None = None) -> np.ndarray:
    """The array of this dtype and shape that was coded. Raises InputError if another one, or none, was."""
    shape = list(shape)
    if axis is not None:
        shape.append(shape.pop(axis) // 3 * 4)
    nbytes = math.prod(shape) * dtype.itemsize
    require(nbytes <= MOST * coded.size, f"{coded.size} bytes cannot stand for {nbytes}")
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(coded, nbytes + 1)
    except zlib.error as error:
        data, why = b"", str(error)
    else:
        why = "it ends too early" if len(data) < nbytes else "more follows"
    require(decoder.eof and len(data) == nbytes and not decoder.unused_data, f"its codes are damaged ({why})")
    bytes_of = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T
    array = np.ascontiguousarray(bytes_of).reshape(-1).view(dtype).reshape(shape)
    return array if axis is None else np.moveaxis(_in_threes(array), -1, axis)


def _in_pairs(packed: np.ndarray) -> np.ndarray:
    """Codes of 3 bits packed along the last axis, 8 in 3 bytes, with 2 in a byte."""
    a, b, c = (packed[..., i::3] for i in range(3))
    return np.stack([a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2], axis=-1).reshape(
        *packed.shape[:-1], -1
    )


def _in_threes(pairs: np.ndarray) -> np.ndarray:
    """The inverse of `_in_pairs`."""
    a, b, c, d = (pairs[..., i::4] for i in range(4))
    return np.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], axis=-1).reshape(*pairs.shape[:-1], -1)
