"""Weights as plain arrays, as files hold them: a compressed weight in its parts, a sparse one as a bitmask and values.

A weight that is pruned, or has enough zeros for it to pay, is stored as a bitmask (a bit for each weight, row by row,
the first in the highest bit) and the values under the set bits, packed where they have fewer than 8 bits. Where a mask
does not pay it is stored beside the dense values. `stored_nbytes` predicts the bytes, from counts alone where arrays
are not entropy-coded (ops.huffman).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.config import require
from efflm.ops import huffman, lowrank
from efflm.ops.format import Format
from efflm.ops.kernels.cpu.dot import Dense, Panels
from efflm.ops.lowrank import LowRank
from efflm.ops.masks import Masks
from efflm.ops.packing import pack, packed_size, unpack
from efflm.ops.qarray import QArray, dequantize

STATIC = ("bits", "axis", "group", "size", "activations", "dtype", "super_block", "coded")
USUAL = {"group": 0, "activations": "float", "super_block": 0, "coded": False}  # which are not written
FLOATS = ("float32", "bfloat16", "float16")
PARTS = ("values", "scale", "zeros", "activation_scale", "super_scale")
PAIR = ("lowrank_a", "lowrank_b")  # of a LowRank weight, beside its base


def to_flat(params: Any) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """{path: array} with compressed weights opened, and {path: format} from which `from_flat` rebuilds them."""
    formats = {
        path: {name: getattr(leaf, name) for name in STATIC if getattr(leaf, name) != USUAL.get(name)}
        for path, leaf in trees.flatten(params)
        if isinstance(_unprepared(leaf), QArray)
    }
    return dict(trees.flatten(params, inside=True)), formats


def _unprepared(weight: Any) -> Any:
    """The weight. Raises InputError for one that ops.prepare made."""
    require(
        not isinstance(weight, Panels | Dense),
        "the model is laid out for the kernels of this machine: give the one that ops.prepare was called with",
    )
    return weight


def from_flat(flat: dict[str, Any], formats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `to_flat`."""
    flat = dict(flat)
    for path, format_ in formats.items():
        parts = {name: flat.pop(f"{path}/{name}") for name in PARTS if f"{path}/{name}" in flat}
        flat[path] = QArray(**parts, **{"dtype": str(parts["scale"].dtype)} | format_)  # which old files do not say
    return trees.unflatten(flat)


def part_shapes(shape: tuple[int, int], format_: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The shapes of a QArray's arrays, for a matrix of this shape in this format; `zeros` may be absent.

    Raises InputError for a format that no such matrix has.
    """
    format_ = USUAL | {"dtype": "float32"} | format_  # the dtype is not in old files
    require(format_.keys() == set(STATIC), f"a format has {', '.join(sorted(format_))}, but must have {STATIC}")
    bits, axis, group, size, activations, dtype, super_block, coded = (format_[name] for name in STATIC)
    require(dtype in FLOATS, f"dtype is {dtype!r:.60}, but must be one of {', '.join(FLOATS)}")
    for name in ("bits", "axis", "group", "size", "super_block"):
        require(type(format_[name]) is int, f"{name} is {format_[name]!r:.60}, but must be a whole number")
    require(type(coded) is bool, f"coded is {coded!r:.60}, but must be true or false")
    Format(bits=bits, group=group, super_block=super_block, activations=activations)  # which refuses what is unknown
    require(axis in (-1, -2), f"axis is {axis}, but must be -1 or -2")
    require(size == shape[axis], f"size is {size}, but the contracted axis has {shape[axis]} entries")
    require(0 <= group < size, f"group is {group}, but must be in [0, {size})")

    def with_length(length: int) -> tuple[int, int]:
        return (shape[0], length) if axis == -1 else (length, shape[1])

    groups, packed = -(-size // group) if group else 1, lambda count: count if bits == 8 else packed_size(count, bits)
    zeros = with_length(packed(groups) if super_block else groups)
    others = {"activation_scale": (1, 1)} if activations == "int8_static" else {}
    others |= {"super_scale": with_length(-(-size // super_block))} if super_block else {}
    return {"values": with_length(packed(size)), "scale": with_length(groups), "zeros": zeros} | others


def array_shapes(
    path: str, shape: tuple[int, ...], format_: dict[str, Any] | None, there: Container[str]
) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays of one weight in the form of `to_flat`; of `zeros` only if they are `there`."""
    if format_ is None:
        return {path: shape}
    shapes = {f"{path}/{part}": part_shape for part, part_shape in part_shapes(shape, format_).items()}
    return {name: shape for name, shape in shapes.items() if name != f"{path}/zeros" or name in there}


def is_dtype_of(dtype: Any, part: str, format_: dict[str, Any] | None) -> bool:
    """Whether this part of a weight can be of this dtype. format_: None for a float array."""
    integers = {}
    if format_:
        codes = np.int8 if format_["bits"] == 8 else np.uint8
        integers = {"values": codes, "zeros": np.int8}
        integers |= {"scale": np.int8, "zeros": codes} if format_.get("super_block") else {}
    return dtype == integers[part] if part in integers else jnp.issubdtype(dtype, jnp.floating)


# --- zeros -----------------------------------------------------------------------------------------------------------


def _bits(weight: Any) -> int:
    """Of what is stored for each weight: codes of a QArray, floats as they are."""
    return weight.bits if isinstance(_unprepared(weight), QArray) else 8 * weight.dtype.itemsize


def _numbers(weight: Any) -> np.ndarray:
    """What is stored for each weight, on the host."""
    if isinstance(_unprepared(weight), QArray):
        return unpack(trees.on_host(weight.values), weight.bits, weight.size, weight.axis)
    return trees.on_host(weight)


def _count(weight: Any) -> int:
    """How many of the stored numbers are not zero, counted where they are; packed ones on the host."""
    if isinstance(_unprepared(weight), QArray):
        return trees.count_nonzero(weight.values if weight.bits == 8 else _numbers(weight))
    return trees.count_nonzero(weight)


def nonzeros(params: Any) -> int:
    """Number of weights that are not exactly zero."""
    uneven = lambda leaf: isinstance(leaf, LowRank) or (isinstance(leaf, QArray) and leaf.zeros is not None)
    return sum(
        trees.count_nonzero(dequantize(leaf)) if uneven(leaf) else _count(leaf) for _, leaf in trees.flatten(params)
    )


def _stored_values(count: int, bits: int) -> int:
    """Bytes of so many values one after another."""
    return packed_size(count, bits) if bits < 8 else count * bits // 8


def stored_kinds(weight: Any, mask: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array that a file holds of a weight, by what follows its path; "" for a dense array
    itself. Where a bitmask and values take fewer bytes than dense values, with the mask beside them if there is one,
    that is what is stored: only how many numbers are not zero is looked at."""
    quantized = isinstance(_unprepared(weight), QArray)
    dense = weight.values if quantized else weight
    arrays = {"values": dense} | {name: getattr(weight, name) for name in PARTS[1:]} if quantized else {"": dense}
    kinds = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items() if x is not None}
    if len(weight.shape) < 2:
        return kinds
    bitmask = jax.ShapeDtypeStruct((-(-math.prod(weight.shape) // 8),), np.dtype(np.uint8))
    bits, count = _bits(weight), _count(weight) if mask is None else trees.count_nonzero(mask)
    if bitmask.size + _stored_values(count, bits) < trees.nbytes(dense) + (0 if mask is None else bitmask.size):
        del kinds["values" if quantized else ""]
        length, dtype = (packed_size(count, bits), np.dtype(np.uint8)) if bits < 8 else (count, dense.dtype)
        return kinds | {"bitmask": bitmask, "nonzeros": jax.ShapeDtypeStruct((length,), dtype)}
    return kinds if mask is None else kinds | {"mask": bitmask}


def stored_parts(weight: Any, mask: Any) -> dict[str, np.ndarray]:
    """The arrays of `stored_kinds`, on the host."""
    kinds, parts = stored_kinds(weight, mask), {}
    if "bitmask" in kinds:
        numbers, bits = _numbers(weight), _bits(weight)
        kept = numbers != 0 if mask is None else trees.on_host(mask)
        values = numbers[kept]
        parts = {"bitmask": np.packbits(kept), "nonzeros": pack(values, bits) if bits < 8 else values}
    elif "mask" in kinds:
        parts = {"mask": np.packbits(trees.on_host(mask))}
    others = (name for name in kinds if name not in parts)
    return parts | {name: trees.on_host(getattr(weight, name) if name else weight) for name in others}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a file: its name, its shape and dtype, and what gives it on the host. packed: see
    huffman.encode. coded: shape and dtype before it was entropy-coded; None: it was not."""

    name: str
    kind: jax.ShapeDtypeStruct
    give: Callable[[], np.ndarray]
    packed: huffman.Packed | None = None
    coded: jax.ShapeDtypeStruct | None = None

    @property
    def nbytes(self) -> int:
        return self.kind.size * self.kind.dtype.itemsize

    def entropy_coded(self) -> "Stored":
        """It entropy-coded, where that is smaller. It is coded now for its size, and again when it is given."""
        coded = lambda: huffman.encode(self.give(), self.packed)
        kind = jax.ShapeDtypeStruct((coded().size,), np.dtype(np.uint8))
        return self if kind.size >= self.nbytes else dataclasses.replace(self, kind=kind, give=coded, coded=self.kind)


def stored(params: Any, masks: Masks = None, coded: bool | None = None) -> Iterator[Stored]:
    """All arrays of a file that holds these weights, each entropy-coded if it is smaller so and `coded` asks for it;
    None: if the format of a weight does (Format.coded)."""
    coded = is_coded(params) if coded is None else coded
    for array in _stored(params, masks or {}):
        yield array.entropy_coded() if coded else array


def is_coded(params: Any) -> bool:
    """Whether one of the weights is for entropy-coded files."""
    return any(isinstance(leaf, QArray) and leaf.coded for _, leaf in trees.flatten(lowrank.split(params)[0]))


def _stored(params: Any, masks: dict[str, Any]) -> Iterator[Stored]:
    bases, pairs = lowrank.split(params)
    for path, weight in trees.flatten(bases):
        mask = masks.get(path)
        give, parts = _each_once(weight, mask), isinstance(weight, QArray) and huffman.in_parts(weight.bits)
        packed = {"values": (weight.axis, weight.bits), "nonzeros": (-1, weight.bits)} if parts else {}
        for part, kind in stored_kinds(weight, mask).items():
            yield Stored(f"{path}/{part}".rstrip("/"), kind, functools.partial(give, part), packed.get(part))
    for path, pair in pairs.items():
        for part, array in zip(PAIR, pair, strict=True):
            kind = jax.ShapeDtypeStruct(array.shape, array.dtype)
            yield Stored(f"{path}/{part}", kind, functools.partial(trees.on_host, array))


def _each_once(weight: Any, mask: Any) -> Callable[[str], np.ndarray]:
    """A function that gives each of the arrays that a file holds of a weight. They are fetched with the first and
    forgotten one by one, so that one weight is on the host at a time."""
    made: dict[str, np.ndarray] = {}

    def part(name: str) -> np.ndarray:
        if name not in made:
            made.update(stored_parts(weight, mask))
        return made.pop(name)

    return part


def stored_nbytes(params: Any, masks: Masks = None, coded: bool | None = None) -> int:
    """Bytes of the tensors in a file that holds these weights, see `stored`. Where they are entropy-coded it takes as
    long as writing them."""
    return sum(each.nbytes for each in stored(params, masks, coded))


def expanded(shape: tuple[int, ...], bits: int, bitmask: np.ndarray, nonzeros: np.ndarray) -> np.ndarray:
    """The dense numbers of a weight stored as a bitmask and the values under its set bits: the inverse of
    `stored_parts`; int8 codes where `bits` is below 8. Raises InputError where the two do not fit."""
    kept = np.unpackbits(bitmask, count=math.prod(shape)).astype(bool)
    count = int(np.count_nonzero(kept))
    require(
        len(nonzeros) == (packed_size(count, bits) if bits < 8 else count),
        f"{len(nonzeros)} values stand for {count} set bits",
    )
    values = unpack(nonzeros, bits, count) if bits < 8 else nonzeros
    numbers = np.zeros(kept.shape, values.dtype)
    numbers[kept] = values
    return numbers.reshape(shape)
