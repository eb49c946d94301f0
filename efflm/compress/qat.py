"""Quantization-aware training: the weights are rounded in every forward pass, and trained through that.

The scales are those of the weights as they are (Jacob 2018, arXiv 1712.05877), or are trained too (LSQ, Esser 2020,
arXiv 1902.08153).
"""

import dataclasses
import math
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
from efflm.ops.grid import own_dtype


def rounded(w: jax.Array, log_scale: jax.Array, sign: jax.Array, format: ops.Format) -> jax.Array:
    """w [K, N] rounded to codes times s = sign * exp(log_scale) [groups, N], with LSQ's gradients (equations 1 to 3).

    A code q = clip(w / s, low, high) is rounded straight-through: the gradient for w is 1 where nothing is clipped and
    else 0, that for s is round(q) - w / s there and else low or high. The gradient for the scale is multiplied by
    1 / sqrt(n high), n weights to a scale, so that scales and weights change in proportion (section 2.2). The scale is
    trained by its logarithm, so that it keeps its sign.
    """
    group = format.group_in(len(w))
    share = 1 / math.sqrt((group or len(w)) * format.high)
    log_scale = log_scale * share + jax.lax.stop_gradient(log_scale * (1 - share))
    scale = sign * jnp.exp(log_scale)
    scale = qarray.by_entry(qarray.with_gradient_of(scale, qarray.as_stored(scale, -2, format)), -2, group, len(w))
    clipped = jnp.clip(w / scale, format.low, format.high)
    return qarray.with_gradient_of(clipped, jnp.round(clipped)) * scale


def learned_scales(model: LanguageModel, formats: Mapping[str, ops.Format]) -> training.Parametrization:
    """All weights, and the scales of those that have a format here, by which they are rounded. Others keep theirs."""
    weights = training.full(model)
    floats = {path: ops.in_float32(w) for path, w in trees.flatten(model.params) if path in formats}
    scales = {path: qarray.grid_of(w, -2, formats[path])[0] for path, w in floats.items()}
    dtypes = {path: format.scale_dtype or own_dtype(scales[path]) for path, format in formats.items()}
    formats = {path: dataclasses.replace(format, scale_dtype=dtypes[path]) for path, format in formats.items()}
    signs = trees.unflatten({path: jnp.sign(scale) for path, scale in scales.items()})

    def start():
        return weights.start() | {LOG_SCALE: trees.unflatten({p: jnp.log(jnp.abs(s)) for p, s in scales.items()})}

    def each(rounding: Callable[..., Any], elsewhere: Callable[..., Any], trainable: Any, signs: Any) -> Any:
        logs, sign = (dict(trees.flatten(tree)) for tree in (trainable[LOG_SCALE], signs))

        def one(path: str, like: Any, w: jax.Array) -> Any:
            return rounding(w, logs[path], sign[path], formats[path]) if path in formats else elsewhere(w, like)

        return training.of_weights(one, model, trainable)

    def stored(w: jax.Array, log_scale: jax.Array, sign: jax.Array, format: ops.Format) -> ops.QArray:
        return ops.quantize_array(w, -2, format, grid=(sign * jnp.exp(log_scale), None))

    seen = lambda trainable, frozen: each(rounded, ops.straight_through, trainable, frozen[LOG_SCALE])
    finished = lambda trained: model.replace(params=each(stored, ops.requantize, trained, signs))
    return dataclasses.replace(weights, start=start, seen=seen, finished=finished, frozen={LOG_SCALE: signs})


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
        require_formats(self, self._plan, activations=("float",), symmetric=(True,), scales=("output",))

    @property
    def _plan(self) -> Plan:
        # The scale with the least squared error: the paper's 2 mean|w| / sqrt(Q) leaves more to the training.
        return plan_of(self, scales="output", clip=self.scales == "learned")

    def __call__(self, model: LanguageModel, context: Context):
        objective = training.objective(self, model, training.teacher_of(self, context, model) if self.distill else None)
        paths = [path for path, _ in trees.flatten(model.params) if in_layer(path)]
        formats = {path: format for path in paths if (format := self._plan.of(path))}
        if self.scales == "learned":
            weights = learned_scales(model, formats)
        else:
            one = lambda p, w: ops.quantize_array(ops.dequantize(w), -2, formats[p]) if p in formats else w
            weights = training.full(model.replace(params=trees.map_with_path(one, model.params)))

        def finished(trained: Any) -> LanguageModel:
            after = weights.finished(trained)
            return after.replace(params=nearest(after.params, self._plan, inside=False))

        return training.train(self, model, context, dataclasses.replace(weights, finished=finished), objective)
