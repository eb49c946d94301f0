"""Trees of weights: leaf paths, selection by regex, counting, bytes.

A leaf is anything with a shape: an array, or a weight in another format that knows its logical shape.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

CHUNK = 1 << 16  # numbers that are looked at at a time: what stays in the cache


def is_leaf(node: Any) -> bool:
    return hasattr(node, "shape")


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any, inside: bool = False) -> list[tuple[str, Any]]:
    """[(path, leaf)] with paths such as "block_0/attention/query/kernel"; `inside` opens compressed weights too."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=None if inside else is_leaf)
    return [("/".join(map(_name, path)), leaf) for path, leaf in leaves]


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any, inside: bool = False) -> Any:
    """tree_map with fn(path, leaf, *leaves_of_rest)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: fn("/".join(map(_name, path)), leaf, *others),
        tree,
        *rest,
        is_leaf=None if inside else is_leaf,
    )


def select(tree: Any, pattern: str) -> list[tuple[str, Any]]:
    """The leaves whose path holds a match of the regex."""
    return [(path, leaf) for path, leaf in flatten(tree) if re.search(pattern, path)]


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts from paths joined by "/"."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def count(tree: Any) -> int:
    """Number of parameters; a compressed weight counts its logical elements."""
    return sum(int(np.prod(leaf.shape)) for _, leaf in flatten(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in memory."""
    return sum(leaf.size * leaf.dtype.itemsize for _, leaf in flatten(tree, inside=True))


def not_finite(tree: Any) -> str:
    """How many numbers of the first array that has such are infinite or NaN, and its path; "" if all are finite."""
    for path, leaf in flatten(tree, inside=True):
        count = _count_not_finite(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        if count:
            return f"{count:,} of the numbers in {path} {'is' if count == 1 else 'are'} infinite or NaN"
    return ""


def _count_not_finite(leaf: Any) -> int:
    parts = _here(leaf)
    if parts is None:
        return _total(_count_on_devices(leaf))
    # In numpy, which compiles nothing, by the bits of the exponent: numpy knows bfloat16 only slowly.
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    infinity = np.array(np.inf, leaf.dtype).view(bits)
    return sum(int(np.count_nonzero((part & infinity) == infinity)) for part in _chunks(parts, bits))


def count_nonzero(leaf: Any) -> int:
    """How many numbers of an array are not zero, counted where they are."""
    parts = _here(leaf)
    if parts is None:
        return _total(_count_nonzero_on_devices(leaf))
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    sign = 1 << (8 * bits.itemsize - 1) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    return sum(
        int(np.count_nonzero(part & bits.type(~sign & (1 << 8 * bits.itemsize) - 1))) for part in _chunks(parts, bits)
    )


def overflowed(before: Any, after: Any) -> bool:
    """Whether a finite number of an array is infinite in `after`, the same array in another dtype."""
    narrower = float(jnp.finfo(after.dtype).max) < float(jnp.finfo(before.dtype).max)
    count = _count_not_finite(after) if narrower else 0
    return count > 0 and count > _count_not_finite(before)


def on_host(leaf: Any) -> np.ndarray:
    """The whole array as numpy has it, on every process; to go over a model, one leaf at a time.

    What np.asarray(leaf) has fetched from an accelerator lives as long as the leaf; this only as long as it is used.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    parts = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))


def equal(one: Any, other: Any) -> bool:
    """Whether two arrays have one shape, dtype and values; nothing is fetched from accelerators that lay both alike."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    alike = isinstance(one, jax.Array) and isinstance(other, jax.Array) and one.sharding == other.sharding
    if alike and _here(one) is None:
        return bool(_equal_on_devices(one, other))
    return np.array_equal(on_host(one), on_host(other))


def _here(leaf: Any) -> list[Any] | None:
    """The parts of an array that lies in this process's memory, each once; None for any other."""
    if not isinstance(leaf, jax.Array):
        return [leaf]
    if leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()):
        return [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    return None


def _chunks(parts: list[Any], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The parts' bits, of as many numbers at a time as stay in the cache."""
    for part in parts:
        flat = np.asarray(part).reshape(-1).view(dtype)
        for start in range(0, flat.size, CHUNK):
            yield flat[start : start + CHUNK]


def _rows(where: jax.Array) -> jax.Array:
    """How many of each row are true: of all together there may be more than an int32 holds."""
    return jnp.sum(where, axis=-1 if where.ndim else None, dtype=jnp.int32)


def _total(counts: jax.Array) -> int:
    return int(on_host(counts).sum(dtype=np.int64))


_count_on_devices = jax.jit(lambda x: _rows(~jnp.isfinite(x)))
_count_nonzero_on_devices = jax.jit(lambda x: _rows(x != 0))
_equal_on_devices = jax.jit(jnp.array_equal)
