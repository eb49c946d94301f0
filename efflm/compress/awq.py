"""AWQ (Lin 2023, arXiv 2306.00978): before rounding, weights that read large activations are scaled up, so that they
lose less of themselves, and their inputs down. The model computes the same."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.ops import qarray


def candidate(magnitudes: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """s = magnitudes^exponent for each input [K], divided by the geometric mean of its least and greatest."""
    s = jnp.power(jnp.maximum(magnitudes, 1e-4 * jnp.max(magnitudes)), exponent)
    s = jnp.where(jnp.max(magnitudes) > 0, s, 1.0)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric"))
def error(w: jax.Array, s: jax.Array, gram: jax.Array, *, bits: int, group: int, symmetric: bool) -> jax.Array:
    """The squared error of the outputs x W of all tokens, where gram is X^T X, if s W is rounded and x divided by s."""
    rounded = ops.dequantize(ops.quantize_array(w * s[:, None], -2, bits=bits, group=group, symmetric=symmetric))
    lost = rounded / s[:, None] - w
    return jnp.sum(lost * jnp.matmul(gram, lost, precision="highest"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ:
    """Scale inputs by the power of their magnitudes that makes rounding lose least. Quantize rounds afterwards."""

    bits: Literal[8, 4, 3] = flag(4, "bits of a weight, as they will be rounded")
    group: int = flag(32, "inputs that will share a scale; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    grid: int = flag(20, "exponents that are tried between 0 and 1")

    at = "bits"
    calibrates = True

    def __post_init__(self):
        qarray.require_format(self.bits, self.group)
        require(self.grid > 0, f"grid is {self.grid}, but must be positive")

    def __call__(self, model: LanguageModel, context: Context):
        def one(layer: Layer, read: calibrate.States) -> Layer:
            params = layer.params
            for place in fold.places(layer.config):
                states, weights = read[place.readers[0]], dict(trees.flatten(params))
                matrices = tuple(ops.in_float32(weights[path]) for path in place.readers)
                magnitudes = states["magnitudes"] / states["tokens"]
                candidates = [
                    fold.shared(layer.config, place, candidate(magnitudes, step / self.grid))
                    for step in range(self.grid)
                ]
                s = self.best(matrices, candidates, states["gram"])
                params = fold.scale_inputs(layer.config, params, place, s)
            return layer.replace(params=params)

        statistics = {"magnitudes": calibrate.MAGNITUDES, "tokens": calibrate.TOKENS, "gram": calibrate.GRAM}
        after = calibrate.map_blocks(model, context.calibration, statistics, one, mesh=context.mesh, title="AWQ")
        return after, record(self, model, after, context)

    def best(self, matrices: Sequence[jax.Array], candidates: Sequence[jax.Array], gram: jax.Array) -> jax.Array:
        """The candidate with the least error, summed over the matrices that read the input."""
        format = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        errors = [float(sum(error(w, s, gram, **format) for w in matrices)) for s in candidates]
        return candidates[errors.index(min(errors))]
