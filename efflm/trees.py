"""Trees of weights: leaf paths, selection by regex, counting, bytes.

A leaf is anything with a shape: an array, or a weight in another format that knows its logical shape.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    if not isinstance(leaf, jax.Array):
        parts = [leaf]
    elif leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()):
        parts = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        return int(_count_on_devices(leaf))
    # In numpy, which compiles nothing, by the bits of the exponent: numpy knows bfloat16 only slowly.
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    infinity, count = np.array(np.inf, leaf.dtype).view(bits), 0
    for part in parts:
        flat = np.asarray(part).reshape(-1).view(bits)
        for start in range(0, flat.size, CHUNK):
            count += int(np.count_nonzero((flat[start : start + CHUNK] & infinity) == infinity))
    return count


@jax.jit
def _count_on_devices(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
