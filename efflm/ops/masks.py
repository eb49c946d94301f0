"""Pruning masks: {path of a weight: bool array of its shape, True where it is kept}, or None where nothing is pruned.

Masks are data beside the weights. A zero that no mask names is a weight like any other.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.ops.qarray import apply_mask

Masks = Mapping[str, Any] | None


def apply_masks(params: Any, masks: Masks) -> Any:
    """The tree with an exact zero for every weight that a mask drops, in any format."""
    masks = masks or {}
    return trees.map_with_path(lambda path, w: apply_mask(w, masks[path]) if path in masks else w, params)


def mask_tree(params: Any, masks: Masks) -> Any:
    """Masks as a tree like params, None for weights without one; None where there is no mask at all.

    Where one layer has a mask, the same weight of every other layer gets one, so that layers can be stacked.
    """
    if not masks:
        return None
    in_any_layer = lambda path: re.sub(r"block_\d+", "block", path)
    masked = {in_any_layer(path) for path in masks}

    def one(path: str, w: Any) -> jax.Array | None:
        if in_any_layer(path) not in masked:
            return None
        return masks[path] if path in masks else jnp.ones(w.shape, bool)

    return trees.map_with_path(one, params)


def masked(tree: Any, masks: Any) -> Any:
    """A tree of arrays like params with zeros where `mask_tree`'s masks are False; as it is where masks is None."""
    if masks is None:
        return tree
    return jax.tree.map(
        lambda mask, x: x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype)),
        masks,
        tree,
        is_leaf=lambda node: node is None,
    )
