"""AWQ (Lin 2023, arXiv 2306.00978): before rounding, weights that read large activations are scaled up, so that they
lose less of themselves, and their inputs down. What the model computes changes by the rounding alone."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.plan import Rounder, nearest, plan_of, require_formats
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel


def candidate(magnitudes: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """s = magnitudes^exponent for each input [K], divided by the geometric mean of its least and greatest."""
    s = jnp.power(jnp.maximum(magnitudes, 1e-4 * jnp.max(magnitudes)), exponent)
    s = jnp.where(jnp.max(magnitudes) > 0, s, 1.0)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


@functools.partial(jax.jit, static_argnames="format")
def error(w: jax.Array, s: jax.Array, gram: jax.Array, format: ops.Format) -> jax.Array:
    """The squared error of the outputs x W of all tokens, where gram is X^T X, if s W is rounded and x divided by s."""
    rounded = ops.dequantize(ops.quantize_array(w * s[:, None], -2, format))
    lost = rounded / s[:, None] - w
    return jnp.sum(lost * jnp.matmul(gram, lost, precision="highest"))


def best(
    matrices: Sequence[tuple[jax.Array, ops.Format]], candidates: Sequence[jax.Array], gram: jax.Array
) -> jax.Array:
    """The candidate with the least error, summed over the matrices that read the input, each in its format."""
    errors = [float(sum(error(w, s, gram, format) for w, format in matrices)) for s in candidates]
    return candidates[errors.index(min(errors))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Rounder):
    """Scale inputs by the power of their magnitudes that makes rounding lose least, and round to the nearest."""

    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(False, "choose the range of each scale by the least squared error")
    grid: int = flag(20, "exponents that are tried between 0 and 1")

    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, plan_of(self), activations=("float", "int8"))
        require(self.grid > 0, f"grid is {self.grid}, but must be positive")

    def __call__(self, model: LanguageModel, context: Context):
        after = self.scaled(model, context)
        after = after.replace(params=nearest(after.params, plan_of(self)))
        return after, record(self, model, after, context)

    def scaled(self, model: LanguageModel, context: Context) -> LanguageModel:
        """The model before it is rounded, which computes the same as it did."""
        plan = plan_of(self)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            params = layer.params
            for place in fold.places(layer.config):
                states, weights = read[place.readers[0]], dict(trees.flatten(params))
                formats = {path: plan.of(layer.path(path)) for path in place.readers}
                rounded = [(ops.in_float32(weights[path]), format) for path, format in formats.items() if format]
                if not rounded:
                    continue
                magnitudes = states["magnitudes"] / states["tokens"]
                candidates = [
                    fold.shared(layer.config, place, candidate(magnitudes, step / self.grid))
                    for step in range(self.grid)
                ]
                s = best(rounded, candidates, states["gram"])
                params = fold.scale_inputs(layer.config, params, place, s)
            return layer.replace(params=params), None

        statistics = {"magnitudes": calibrate.MAGNITUDES, "tokens": calibrate.TOKENS, "gram": calibrate.GRAM}
        return calibrate.walk(model, context.calibration, one, statistics, mesh=context.mesh, title="AWQ")[0]
