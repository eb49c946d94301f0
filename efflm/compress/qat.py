"""Quantization-aware training: the weights are rounded in every forward pass, and trained through that.

The scales are those of the weights as they are (Jacob 2018, arXiv 1712.05877), or are trained too (LSQ, Esser 2020,
arXiv 1902.08153).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import training
from efflm.compress.plan import Plan, Rounder, nearest, plan_of, require_formats
from efflm.compress.step import Context
from efflm.config import flag
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel
from efflm.model.params import LOG_SCALE, in_layer
from efflm.ops import qarray
from efflm.ops.grid import Grid, as_stored, grid_of

# Of a matrix: its path, as it is rounded at the start, its weights, all that is trained -> the grid it is rounded to.
Grids = Callable[[str, ops.QArray, jax.Array, Any], Grid]


def on_grids(model: LanguageModel, formats: Mapping[str, ops.Format], grids: Grids) -> training.Parametrization:
    """All weights, in every forward pass and at the end rounded to these grids where they have a format here. Others
    keep theirs."""
    begun = model.replace(params=trees.map_with_path(lambda p, w: _begun(w, formats.get(p)), model.params))
    weights = training.full(begun)

    def each(rounding: Callable[..., Any], elsewhere: Callable[..., Any], trainable: Any, frozen: Any) -> Any:
        def one(path: str, like: Any, w: jax.Array) -> Any:
            like = frozen.get(path, like)
            if path not in formats:
                return elsewhere(w, like)
            return rounding(w, like.axis, like.format, grids(path, like, w, trainable))

        return training.of_weights(one, begun, trainable)

    seen = lambda trainable, frozen: each(qarray.on_grid, ops.straight_through, trainable, frozen)
    finished = lambda trained: model.replace(params=each(ops.quantize_array, ops.requantize, trained, weights.frozen))
    return dataclasses.replace(weights, start=lambda: training.masters(model), seen=seen, finished=finished)


def _begun(w: Any, format: ops.Format | None) -> Any:
    """A matrix rounded to its format; one that is in it already stays."""
    if format is None:
        return w
    floats = ops.in_float32(w)
    kind = lambda f: (f.bits, f.group_in(len(floats)), f.super_block_in(len(floats)), f.symmetric)
    same = isinstance(w, ops.QArray) and kind(w.format) == kind(format)
    return w if same else ops.quantize_array(floats, -2, format)


def running_scales(model: LanguageModel, formats: Mapping[str, ops.Format]) -> training.Parametrization:
    """All weights, rounded by the scales of the weights as they are at each step."""
    return on_grids(model, formats, lambda path, _, w, __: grid_of(jax.lax.stop_gradient(w), -2, formats[path]))


def learned_scales(model: LanguageModel, formats: Mapping[str, ops.Format]) -> training.Parametrization:
    """All weights, and the scales they are rounded by. Zeros, and the signs of scales, stay.

    A scale is that of the start times exp(t / r), with t from 0 on, and r the root mean square of the matrix. So a step
    of t changes the scale by the share by which a step of the same size changes a weight: LSQ's balance (section 2.2),
    which it gets by the size of gradients, and AdamW, for one, takes no notice of that.
    """
    flat = [(path, w) for path, w in trees.flatten(model.params) if path in formats]
    sizes = {path: float(jnp.sqrt(jnp.mean(jnp.square(ops.in_float32(w))))) or 1.0 for path, w in flat}

    def grids(path: str, like: ops.QArray, w: jax.Array, trainable: Any) -> Grid:
        scale = qarray.scales(like) * jnp.exp(trainable[LOG_SCALE][path] / sizes[path])
        stored = as_stored(scale, like.axis, like.format)
        return qarray.with_gradient_of(scale, stored), qarray.zero_points(like)

    weights = on_grids(model, formats, grids)
    logs = lambda: {path: jnp.zeros_like(qarray.scales(weights.frozen[path])) for path in formats}
    return dataclasses.replace(weights, start=lambda: training.masters(model) | {LOG_SCALE: logs()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class QAT(TrainSettings, Rounder):
    """Round the matrices inside the layers and train all weights with that; then round embeddings to the nearest."""

    scales: Literal["learned", "running"] = flag(
        "learned", "trained like weights (LSQ); running: always that of the largest weight of the group"
    )
    learning_rate: float = flag(1e-4, "peak learning rate")
    distill: bool = flag(True, "imitate the teacher; false: learn from the text alone")

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, self._plan, activations=("float",), scales=("output",))

    @property
    def _plan(self) -> Plan:
        # The scale with the least squared error: the paper's 2 mean|w| / sqrt(Q) leaves more to the training.
        return plan_of(self, scales="output", clip=self.scales == "learned")

    def __call__(self, model: LanguageModel, context: Context):
        objective = training.objective(self, model, training.teacher_of(self, context, model) if self.distill else None)
        paths = [path for path, _ in trees.flatten(model.params) if in_layer(path)]
        formats = {path: format for path in paths if (format := self._plan.of(path))}
        weights = (learned_scales if self.scales == "learned" else running_scales)(model, formats)

        def finished(trained: Any) -> LanguageModel:
            after = weights.finished(trained)
            return after.replace(params=nearest(after.params, self._plan, inside=False))

        return training.train(self, model, context, dataclasses.replace(weights, finished=finished), objective)
