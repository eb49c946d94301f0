"""GPTQ (Frantar 2022, arXiv 2210.17323): rounding whose errors the inputs that are not yet rounded compensate for."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress import calibrate, obs
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.ops import qarray


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def round_matrix(
    w: jax.Array, inverse: obs.Inverse, kept: jax.Array, grid: qarray.Grid, *, bits: int, group: int = 0
) -> jax.Array:
    """w float32 [K, N] rounded to the codes of a grid (ops.qarray.grid_of), as floats.

    inverse: of what it reads (obs.inverse). kept: False for weights that stay zero. The scales were made before, from
    groups of neighbours, so the order in which inputs are rounded need not be known afterwards.
    """
    scale, zeros = grid
    K, most = w.shape[0], 2 ** (bits - 1) - 1
    each = lambda part: jnp.broadcast_to(qarray.by_entry(part.astype(jnp.float32), 0, group, K), w.shape)
    offset = jnp.zeros(w.shape) if zeros is None else each(zeros)
    after = _Round(-most if zeros is None else -most - 1, most)
    return obs.compensated(jnp.where(kept, w, 0.0), inverse, (kept, each(scale), offset), _kept, after)[0]


def _kept(parts: Any, w: jax.Array, diagonal: jax.Array) -> jax.Array:
    return parts[0]


@dataclasses.dataclass(frozen=True)
class _Round:
    """An input's weights rounded to codes from `low` to `high`."""

    low: int
    high: int

    def __call__(self, parts: Any, w: jax.Array, kept: jax.Array) -> jax.Array:
        _, scale, offset = parts
        scale = jnp.where(scale > 0, scale, 1.0)  # inputs that are not there
        codes = jnp.clip(jnp.round(w / scale) + offset, self.low, self.high)
        return jnp.where(kept, (codes - offset) * scale, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Matrices inside the layers, rounded one input after another. Embeddings are left to Quantize."""

    bits: Literal[8, 4, 3] = flag(4, "bits of a weight")
    group: int = flag(32, "inputs that share a scale; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "choose the range of each scale by the least squared error")
    order: bool = flag(True, "round the inputs with the largest activations first")
    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean")

    at = "bits"
    calibrates = True

    def __post_init__(self):
        qarray.require_format(self.bits, self.group)
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")

    def __call__(self, model: LanguageModel, context: Context):
        format = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}

        def one(layer: Layer, read: calibrate.States) -> Layer:
            inverse = obs.inverses(layer, read, self.damping, sort=self.order)

            def matrix(path: str, leaf: Any) -> Any:
                if path not in read:
                    return leaf
                w = ops.in_float32(leaf)
                kept = layer.masks.get(path, np.ones(w.shape, bool))
                grid = qarray.grid_of(w, -2, **format, clip=self.clip)
                rounded = round_matrix(w, inverse(path), kept, grid, bits=self.bits, group=self.group)
                return ops.quantize_array(rounded, -2, **format, grid=grid)

            return layer.replace(params=trees.map_with_path(matrix, layer.params))

        after = calibrate.map_blocks(
            model, context.calibration, {"gram": calibrate.GRAM}, one, mesh=context.mesh, title="GPTQ"
        )
        return after, record(self, model, after, context)
