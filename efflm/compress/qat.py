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


def rounded(w: jax.Array, log_scale: jax.Array, format: ops.Format) -> jax.Array:
    """w [K, N] rounded to codes times exp(log_scale) [groups, N], with the gradients of LSQ (equations 1 to 3).

    A code q = clip(w / s, -Q, Q) is rounded straight-through: the gradient for w is 1 where nothing is clipped and else
    0, that for s is round(q) - w / s there and else +-Q. The gradient for the scale is multiplied by 1 / sqrt(n Q),
    n weights to a scale, so that scales and weights change in proportion (section 2.2). The scale is trained by its
    logarithm, which keeps it positive.
    """
    most, group = format.high, format.group_in(len(w))
    share = 1 / math.sqrt((group or len(w)) * most)
    log_scale = log_scale * share + jax.lax.stop_gradient(log_scale * (1 - share))
    scale = qarray.by_entry(jnp.exp(log_scale), -2, group, len(w))
    clipped = jnp.clip(w / scale, -most, most)
    return qarray.with_gradient_of(clipped, jnp.round(clipped)) * scale


def learned_scales(model: LanguageModel, formats: Mapping[str, ops.Format]) -> training.Parametrization:
    """All weights, and the scales of those that have a format here, by which they are rounded. Others keep theirs."""
    weights = training.full(model)

    def start():
        params = weights.start()
        scales = {p: jnp.log(qarray.grid_of(w, -2, formats[p])[0]) for p, w in trees.flatten(params) if p in formats}
        return params | {LOG_SCALE: trees.unflatten(scales)}

    def each(rounding: Callable[..., Any], elsewhere: Callable[..., Any], trainable: Any) -> Any:
        scales = dict(trees.flatten(trainable[LOG_SCALE]))
        one = lambda path, like, w: rounding(w, scales[path], formats[path]) if path in formats else elsewhere(w, like)
        return training.of_weights(one, model, trainable)

    stored = lambda w, log_scale, format: ops.quantize_array(w, -2, format, grid=(jnp.exp(log_scale), None))
    seen = lambda trainable, _: each(rounded, ops.straight_through, trainable)
    finished = lambda trained: model.replace(params=each(stored, ops.requantize, trained))
    return dataclasses.replace(weights, start=start, seen=seen, finished=finished)


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
