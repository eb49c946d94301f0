"""GPTQ (Frantar 2022, arXiv 2210.17323): rounding whose errors the inputs that are not yet rounded compensate for.

Each matrix is rounded for what it reads once those before it are rounded, and first corrected toward what it gave in
the model as it was (QEP: Arai 2025, arXiv 2504.09629).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress import calibrate, obs
from efflm.compress.calibrate import Layer
from efflm.compress.plan import ENTROPY, Rounder, counted, grid_for, nearest, plan_of, require_formats
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.ops.grid import Grid, by_entry


def round_matrix(w: jax.Array, inverse: obs.Inverse, kept: jax.Array, grid: Grid, format: ops.Format) -> jax.Array:
    """w float32 [K, N] rounded to the codes of a grid (ops.grid.grid_of), as floats.

    inverse: of what it reads (obs.inverse). kept: False for weights that become zero, for which others compensate too.
    The scales were made before, from groups of neighbours, so the order in which inputs are rounded need not be known
    afterwards.
    """
    (scale, zeros), K = grid, w.shape[0]
    each = lambda part: jnp.broadcast_to(by_entry(part.astype(jnp.float32), 0, format.group_in(K), K), w.shape)
    offset = jnp.zeros(w.shape) if zeros is None else each(zeros)
    low = jnp.full(K, format.low, jnp.float32)  # no constant, so that one program is compiled for all bits
    return obs.compensated(w, inverse, (kept, each(scale), offset, low), _kept, _rounded)[0]


def _kept(parts: Any, w: jax.Array, diagonal: jax.Array) -> jax.Array:
    return parts[0]


def _rounded(parts: Any, w: jax.Array, kept: jax.Array) -> jax.Array:
    """An input's weights rounded to codes."""
    _, scale, offset, low = parts
    scale = jnp.where(scale != 0, scale, 1.0)  # inputs that are not there
    codes = jnp.clip(jnp.round(w / scale) + offset, low, -low - 1)
    return jnp.where(kept, (codes - offset) * scale, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Rounder):
    """Matrices inside the layers and of the output, rounded one input after another; embeddings to the nearest."""

    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(
        True, "choose the range of each scale by the least squared error of what the matrix gives, inputs apart"
    )
    order: bool = flag(True, "round the inputs with the largest activations first")
    entropy: float = flag(0.0, ENTROPY)
    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean")
    correction: float = flag(
        0.5, "share of what earlier matrices lost that each makes up for; 0: none, and fewer passes"
    )

    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, plan_of(self), activations=("float", "int8"))
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")
        require(0 <= self.correction <= 1, f"correction is {self.correction}, but must be between 0 and 1: 0.5")

    def __call__(self, model: LanguageModel, context: Context):
        plan, counts = plan_of(self), counted(context.calibration, model.config.vocabulary)
        statistics = {"gram": calibrate.GRAM} | ({"shift": calibrate.SHIFT} if self.correction else {})

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            inverse = obs.inverses(layer, read, self.damping, sort=self.order)

            def matrix(path: str, leaf: Any) -> Any:
                format = plan.of(layer.path(path))
                if path not in read or format is None or (layer.index is None and isinstance(leaf, ops.QArray)):
                    return leaf
                w, importance = ops.in_float32(leaf), jnp.diag(read[path]["gram"])
                importance = jnp.where(jnp.any(importance > 0), importance, 1.0)  # an expert that no text reaches
                if path == "embedding":  # tokens are looked up in it too, so none makes up for what others lose
                    return ops.quantize_array(w, -1, format, grid_for(layer.path(path), w, format, counts, importance))
                kept = layer.masks.get(path, np.ones(w.shape, bool))
                if self.correction:
                    w = obs.corrected(w, inverse(path), read[path]["shift"], self.correction)
                grid = grid_for(layer.path(path), w, format, counts, importance)
                return ops.quantize_array(round_matrix(w, inverse(path), kept, grid, format), -2, format, grid=grid)

            return layer.replace(params=trees.map_with_path(matrix, layer.params)), None

        given = {"mesh": context.mesh, "title": "GPTQ", "sublayers": True, "output": True}
        after, _ = calibrate.walk(model, context.calibration, one, statistics, **given)
        after = after.replace(params=nearest(after.params, plan, inside=False, counts=counts))
        return after, record(self, model, after, context)
