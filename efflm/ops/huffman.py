"""Arrays entropy-coded for files: Huffman codes of their bytes, by zlib.

The bytes are those that arrays are stored in, with two or four codes of 4 or 2 bits in each: a Huffman code has whole
bits, which costs little where a byte holds several codes. Codes of which bytes hold parts are coded with as many whole
ones in a byte as there is room for: two of 3 bits, one of 5, 6 or 7. Of floats the first bytes of all are coded
together, then the second ones, and so on.

zlib is asked for Huffman codes alone, made anew for about every 32 KB. It could also look for repetitions; rounded
weights have none, and what looks like them costs up to a third where the codes are few. Every byte takes a bit at
least, so that what is coded stands for at most MOST times as many bytes, and a reader can refuse what claims more.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from efflm.config import require
from efflm.ops.packing import regrouped, unit

MOST = 8


Packed = tuple[int, int]  # the axis of packed codes, and the bits of one


def encode(array: np.ndarray, packed: Packed | None = None) -> np.ndarray:
    """The coded array, uint8 [n]. packed: of codes of which bytes hold parts (`in_parts`); None for all else."""
    array = array if packed is None else regrouped(np.moveaxis(array, packed[0], -1), 8, _whole(packed[1]))
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
    coder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    parts = [coder.compress(np.ascontiguousarray(plane)) + coder.flush(zlib.Z_FULL_FLUSH) for plane in planes]
    return np.frombuffer(b"".join([*parts, coder.flush()]), np.uint8)


def decode(coded: np.ndarray, dtype: np.dtype, shape: Sequence[int], packed: Packed | None = None) -> np.ndarray:
    """The array of this dtype and shape that was coded. Raises InputError if another one, or none, was."""
    shape = list(shape)
    if packed:
        axis, whole = packed[0], _whole(packed[1])
        shape.append(shape.pop(axis) * 8 // whole)
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
    return np.moveaxis(regrouped(array, whole, 8), -1, axis) if packed else array


def in_parts(bits: int) -> bool:
    """Whether bytes hold parts of packed codes."""
    return unit(bits)[1] > 1


def _whole(bits: int) -> int:
    """Bits of the whole codes in a byte."""
    return 8 // bits * bits
