"""Named tensors on disk, read one at a time: the seam between file formats and the families of models."""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from efflm.cli import run_directory
from efflm.config import InputError, require
from efflm.model import require_fits

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = FLOATS | {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
FLOATING = {np.dtype(dtype) for dtype in FLOATS.values()}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """shapes: {name: shape}. read(name): that tensor, maybe a view of the file. metadata: strings beside them."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def from_safetensors(path: Path) -> Tensors:
    """The tensors of one file, mapped into memory only while they are read. Raises InputError.

    The safetensors library checks that the header is no longer than the file and that the tensors' sizes, counted
    without overflow, fill the rest of it without holes or overlaps; only then is anything read.
    """
    require(path.is_file(), f"no model file at {path}")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): fetch or export it again") from None
    metadata = header.pop("__metadata__", None) or {}

    def read(name: str) -> np.ndarray:
        entry = header[name]
        require(
            entry["dtype"] in DTYPES,
            f"{name} in {path} is stored as {entry['dtype']}, but only {', '.join(DTYPES)} are read: give the model "
            "before it was quantized",
        )
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        return np.memmap(path, DTYPES[entry["dtype"]], "r", start, shape or (1,)).reshape(shape)

    return Tensors({name: tuple(entry["shape"]) for name, entry in header.items()}, read, metadata)


Named = tuple[str, jax.ShapeDtypeStruct, Callable[[], np.ndarray]]  # a tensor: its name, its kind, what gives it


def write_safetensors(path: Path, names: Iterable[Named], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in this order, holding one at a time. metadata: strings beside them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    start, names = 0, list(names)
    for name, kind, _ in names:
        size = kind.size * kind.dtype.itemsize
        header[name] = {"dtype": NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, start + size]}
        start += size
    text = run_directory.to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, array in names:
            file.write(np.ascontiguousarray(array()).view(np.uint8).data)


def require_dtype(dtype: str | None) -> None:
    """Raise InputError unless weights can be asked for in `dtype`; None leaves them in the one they have."""
    choices = (None, "float32", "bfloat16", "float16")
    require(dtype in choices, f"dtype is {dtype!r}, but must be float32, bfloat16 or float16")


def place(array: np.ndarray, dtype: Any, where: jax.sharding.Sharding, name: str = "a weight") -> jax.Array:
    """A copy of the array on the devices, each part cut out and cast by itself; dtype None keeps the array's own, but
    float64 becomes float32.

    Raises InputError, with the array's name, where a finite number does not fit the dtype.
    """
    dtype = np.dtype(dtype or (np.float32 if array.dtype == np.float64 else array.dtype))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        with np.errstate(over="ignore"):
            made = np.array(array[index], dtype, order="C", copy=True)
        if jnp.issubdtype(dtype, jnp.floating):
            require_fits(name, np.asarray(array[index]), made)
        return made

    return jax.make_array_from_callback(array.shape, where, part)
