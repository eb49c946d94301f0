"""Weights made smaller along named axes: of each weight that has the axis, the slices that are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.config import require
from efflm.config.model import BlockConfig
from efflm.model import LanguageModel
from efflm.model.params import find

# Of a layer: its key-value heads, each with the query heads that read it, and the channels of its feed-forward part.
IN_LAYER = ("groups", "mlp")
WIDTH = "width"  # of the model: the residual stream

Kept = Mapping[tuple[int | None, str], Sequence[int]]  # {(layer or None, axis): indices}


def slice_params(model: LanguageModel, kept: Kept) -> LanguageModel:
    """The model with the slices `kept`, in that order; masks and the formats of weights go along. Raises InputError.

    kept: {(layer, "groups" or "mlp"): indices} and {(None, "width"): indices}; other axes stay whole. A layer without
    some groups or channels computes what it does with zeros in their place. Norms average over the width that is left.
    """
    config = model.config
    for (layer, axis), indices in kept.items():
        known = (WIDTH,) if layer is None else IN_LAYER
        owner = "the model" if layer is None else f"layer {layer}"
        require(
            layer is None or axis not in ("heads", "kv_heads"),
            f"{axis} of {owner} do not go alone, since each key-value head must keep as many query heads as the "
            "others: give groups",
        )
        require(axis in known, f"{owner} has no axis {axis!r}: choose from {', '.join(known)}")
        require(
            layer is None or 0 <= layer < len(config.blocks),
            f"{owner} is not there: the layers are 0 to {len(config.blocks) - 1}",
        )
        size = config.width if layer is None else sizes(config.blocks[layer])[axis]
        _require_indices(indices, size, f"{axis} of {owner}")
    layers = [{axis: kept[i, axis] for axis in IN_LAYER if (i, axis) in kept} for i in range(len(config.blocks))]
    width = {WIDTH: kept[None, WIDTH]} if (None, WIDTH) in kept else {}

    def one(path: str, leaf: Any) -> Any:
        name = path.partition("/")[0]
        index = int(name.removeprefix("block_")) if name.startswith("block_") else None
        own = {} if index is None else features(config.blocks[index], layers[index])
        return sliced(path, leaf, own | width)

    masks = model.masks and {path: one(path, mask) for path, mask in model.masks.items()}
    blocks = tuple(sliced_block(block, own) for block, own in zip(config.blocks, layers, strict=True))
    after = dataclasses.replace(config, blocks=blocks, width=len(width.get(WIDTH, range(config.width))))
    return model.replace(config=after, params=trees.map_with_path(one, model.params), masks=masks)


def sizes(block: BlockConfig) -> dict[str, int]:
    """How many slices a layer has along each axis of IN_LAYER."""
    return {"groups": block.kv_heads, "mlp": block.mlp_dim}


def sliced_block(block: BlockConfig, kept: Mapping[str, Sequence[int]]) -> BlockConfig:
    """kept: {axis of IN_LAYER: indices}."""
    groups, each = len(kept.get("groups", range(block.kv_heads))), block.heads // block.kv_heads
    mlp_dim = len(kept.get("mlp", range(block.mlp_dim)))
    return dataclasses.replace(block, heads=groups * each, kv_heads=groups, mlp_dim=mlp_dim)


def features(block: BlockConfig, kept: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The indices along the axes that weights have (model.params). kept: {axis of IN_LAYER: indices}."""
    found = {"mlp": np.asarray(kept["mlp"])} if "mlp" in kept else {}
    if "groups" in kept:
        for axis, heads in (("heads", block.heads), ("kv_heads", block.kv_heads)):
            each = heads // block.kv_heads * block.head_dim
            found[axis] = (np.asarray(kept["groups"])[:, None] * each + np.arange(each)).reshape(-1)
    return found


def sliced(path: str, leaf: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """A weight, or its mask, along those of its axes that are in `kept`."""
    param, _ = find(path)
    for axis, name in enumerate(param.axes):
        if name in kept:
            leaf = ops.take(leaf, axis, jnp.asarray(kept[name]))
    return leaf


def _require_indices(indices: Sequence[int], size: int, what: str) -> None:
    chosen = np.asarray(indices)
    require(chosen.size > 0, f"no {what} is kept: keep one at least")
    outside = chosen[(chosen < 0) | (chosen >= size)]
    require(not outside.size, f"{what}: {outside[:1]} is out of range, the last is {size - 1}")
    require(len(np.unique(chosen)) == len(chosen), f"{what}: an index is repeated in {chosen.tolist()!r:.60}")
