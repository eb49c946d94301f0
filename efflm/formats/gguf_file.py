"""GGUF files: their header, read with every number checked against the file, their tensors, dequantized; and written.

The layout is that of ggml's docs/gguf.md: a magic number, a version, two counts, typed key-value pairs, tensor
descriptions, padding, tensor data. A file is a stranger's: each count and length is believed only as far as the file's
own size bears it out, so that a bad file costs no more time and memory than a good one of its size. Values of the
quantized types are those of the `gguf` library.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efflm.config import InputError, require

# ggml's number of each type that is read here: its name, the elements in a block and the bytes of a block.
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
FLOATS = ("F32", "F16", "BF16")
SIZES = {name: (elements, width) for name, elements, width in KINDS.values()}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Lists of strings that are read; others are stepped over. What is a list in a header is large.
LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
CHUNK = 1 << 16  # elements that are dequantized at a time: what stays in the cache


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor's place in the file. shape: as in numpy, rows first; kind: the name in KINDS; start, size: in bytes."""

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. Numeric lists are arrays; a list of strings not in LISTS is None."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Raises InputError if the file is no GGUF file, is damaged, or stores a tensor in a type not in KINDS."""
    require(path.is_file(), f"no model file at {path}")
    size = path.stat().st_size
    require(size >= 24, f"{path} is not a GGUF file: it has {size} bytes, fewer than any header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(data, size, path)
        except InputError as error:
            raise InputError(f"{path} cannot be read as GGUF: {error}") from None


def _parse(data: mmap.mmap, size: int, path: Path) -> Header:
    at = 0

    def take(form: str) -> tuple:
        nonlocal at
        width = struct.calcsize(form)
        require(width <= size - at, f"it ends inside its header, at byte {size}")
        at += width
        return struct.unpack_from(form, data, at - width)

    def fits(count: int, width: int, what: str) -> None:
        require(count * width <= size - at, f"it claims {count:,} {what}, more than its {size:,} bytes hold")

    def skip(count: int, what: str) -> int:
        """Pass `count` bytes; where they began."""
        nonlocal at
        fits(count, 1, f"bytes in {what}")
        at += count
        return at - count

    def string(what: str) -> str:
        (length,) = take("<Q")
        start = skip(length, what)
        try:
            return data[start:at].decode()
        except UnicodeDecodeError:
            raise InputError(f"{what} is not UTF-8 text") from None

    def strings(count: int, shown: str, keep: bool) -> list[str] | None:
        """Pass a list of strings; they are vocabularies, so this is where the time goes."""
        nonlocal at
        fits(count, 8, f"strings in {shown}")
        found = []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > size:
                raise InputError(f"an entry of {shown} ends at byte {at:,}, but the file has {size:,}")
            if keep:
                found.append(data[start:at])
        try:
            return [entry.decode() for entry in found] if keep else None
        except UnicodeDecodeError:
            raise InputError(f"an entry of {shown} is not UTF-8 text") from None

    def value(key: str, shown: str) -> Any:
        (kind,) = take("<I")
        if kind in SCALARS:
            return take("<" + SCALARS[kind])[0]
        if kind == STRING:
            return string(f"the value of {shown}")
        require(kind == ARRAY, f"{shown} has a value of unknown type {kind}")
        kind, count = take("<IQ")
        if kind in SCALARS:
            start = skip(count * struct.calcsize(SCALARS[kind]), f"the list {shown}")
            return np.frombuffer(data[start:at], np.dtype("<" + SCALARS[kind]))
        require(kind == STRING, f"{shown} is a list of values of type {kind}, but lists hold numbers or strings")
        return strings(count, shown, keep=key in LISTS)

    require(data[:4] == b"GGUF", "it does not begin with the letters GGUF")
    at = 4
    (version,) = take("<I")
    require(
        version in (2, 3), f"it has version {version} or is big-endian, but versions 2 and 3, little-endian, are read"
    )
    tensor_count, pair_count = take("<QQ")
    fits(tensor_count, 24, "tensors")
    fits(pair_count, 13, "key-value pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = string("a key")
        require(key not in metadata, f"it has the key {key!r:.80} twice")
        metadata[key] = value(key, f"{key!r:.80}")
    described = {}
    for _ in range(tensor_count):
        name = string("a tensor's name")
        require(name not in described, f"it has the tensor {name!r:.80} twice")
        (dimensions,) = take("<I")
        require(1 <= dimensions <= 4, f"tensor {name!r:.80} has {dimensions} dimensions, but 1 to 4 are possible")
        described[name] = (take(f"<{dimensions}Q"), *take("<IQ"))
    alignment = metadata.get("general.alignment", 32)
    require(
        type(alignment) is int and 8 <= alignment <= 1 << 16 and alignment & (alignment - 1) == 0,
        f"general.alignment is {alignment!r:.80}, but must be a power of two from 8 to 65536",
    )
    data_start = -(-at // alignment) * alignment
    tensors = {name: _place(name, *about, alignment, data_start) for name, about in described.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        require(tensor.start >= end, f"tensor {name!r:.80} overlaps another")
        end = tensor.start + tensor.size
        require(end <= size, f"tensor {name!r:.80} ends at byte {end:,}, but the file has {size:,}: fetch it again")
    return Header(path, metadata, tensors)


def _place(name: str, dims: tuple[int, ...], kind: int, offset: int, alignment: int, data_start: int) -> Tensor:
    """ggml counts dimensions from the innermost; its blocks lie along that one."""
    require(
        kind in KINDS,
        f"tensor {name!r:.80} is stored as ggml type {_type_name(kind)}, but read are "
        + ", ".join(label for label, _, _ in KINDS.values()),
    )
    label, elements, width = KINDS[kind]
    require(all(dims), f"tensor {name!r:.80} has no elements: its dimensions are {dims}")
    require(dims[0] % elements == 0, f"tensor {name!r:.80} has rows of {dims[0]}, but {label} has blocks of {elements}")
    require(offset % alignment == 0, f"tensor {name!r:.80} starts at byte {offset:,}, not a multiple of {alignment}")
    return Tensor(dims[::-1], label, data_start + offset, math.prod(dims) // elements * width)


def _type_name(kind: int) -> str:
    import gguf

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return str(kind)


def read_tensor(header: Header, name: str) -> np.ndarray:
    """The tensor as float32, rows first, holding little beyond the result."""
    import gguf

    tensor = header.tensors[name]
    rows = math.prod(tensor.shape[:-1])
    stored = np.memmap(header.path, np.uint8, "r", offset=tensor.start, shape=(rows, tensor.size // rows))
    values = np.empty((rows, tensor.shape[-1]), np.float32)
    step = max(1, CHUNK // tensor.shape[-1])
    try:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        with np.errstate(all="ignore"):  # damaged scales may be anything
            for start in range(0, rows, step):
                part = np.array(stored[start : start + step])
                # As one row: through many the library goes in small groups, which takes over twice as long.
                values[start : start + step] = gguf.quants.dequantize(part.reshape(1, -1), kind).reshape(len(part), -1)
    except (KeyError, NotImplementedError):
        raise InputError(
            f"{header.path} has {name!r:.80} stored as {tensor.kind}, which is newer than the gguf library here: "
            "update it (pip install -U gguf)"
        ) from None
    return values.reshape(tensor.shape)


# --- writing ---------------------------------------------------------------------------------------------------------


class New(NamedTuple):
    """A tensor to be written. shape: as in numpy, rows first; kind: a name in KINDS; blocks: what gives its bytes,
    uint8 [..., bytes of a row]."""

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: Callable[[], np.ndarray]

    @property
    def row_bytes(self) -> int:
        elements, width = SIZES[self.kind]
        return self.shape[-1] // elements * width

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def nbytes(tensors: Sequence[New]) -> int:
    """Bytes of the tensors in a file, each with what fills it up to a multiple of 32."""
    return sum(-(-tensor.nbytes // 32) * 32 for tensor in tensors)


def write(path: Path, metadata: dict[str, Any], tensors: Sequence[New]) -> None:
    """Write a file, holding one tensor at a time. metadata: strings, bools, floats (as float32), whole numbers (as
    uint32) and lists of them by key. Raises OSError."""
    import gguf

    kinds = {str: "STRING", bool: "BOOL", float: "FLOAT32", int: "UINT32", list: "ARRAY"}
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    try:
        for key, value in metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
        for tensor in tensors:
            of_rows = (*tensor.shape[:-1], tensor.row_bytes)
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, of_rows, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.blocks()))
    finally:
        writer.close()


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Floats [rows, columns] as the blocks of a kind, uint8, by the library's rounding to the nearest."""
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
