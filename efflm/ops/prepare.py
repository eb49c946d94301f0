"""Laying weights out for the kernels of a backend, once, after a model is loaded."""

from typing import Any

import jax

from efflm import trees
from efflm.ops.kernels.cpu import build
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.lowrank import LowRank
from efflm.ops.qarray import QArray


def prepare(model: Any, platform: str) -> Any:
    """The model, or any tree of weights, as the kernels of `platform` ("cpu", "gpu", "tpu") read it fastest.

    What it returns computes the same, has the same `about` and is never saved. On CPUs matrices are laid out for the
    native kernels, where these can be built; weights spread over several devices stay as they are, and so does
    everything elsewhere.
    """
    form = build.form() if platform == "cpu" else ""
    if not form:
        return model

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            return leaf.replace(base=one(path, leaf.base))
        whole = all(isinstance(x, jax.Array) and len(x.sharding.device_set) == 1 for x in jax.tree.leaves(leaf))
        if leaf.ndim != 2 or 0 in leaf.shape or not whole:
            return leaf
        if isinstance(leaf, QArray):
            return cpu.panels(leaf, form) if cpu.takes(leaf) else leaf
        return cpu.Dense(leaf, form) if str(leaf.dtype) in cpu.FEW_ROWS else leaf

    laid = trees.map_with_path(one, model)
    return laid.with_about(model.about) if hasattr(model, "about") else laid


def prepared(model: Any, platform: str) -> Any:
    """`prepare` of a model, once: what it made is kept with this value of the model and goes with it. Until then
    quantized matrices are in memory twice."""
    made, key = vars(model).setdefault("_prepared", {}), (platform, build.form() if platform == "cpu" else "")
    if key not in made:
        made[key] = prepare(model, platform)
    return made[key]
