"""SmoothQuant (Xiao 2022, arXiv 2211.10438): the outliers of activations made smaller, and the weights that read them
larger, so that both are easier to round. The model computes the same.

The paper divides an input by the largest magnitude that it has in any token. Here it is the root mean square over
tokens, each of which is divided by its own first: where each token has a scale of its own, as in W8A8, only that
matters. Llama-like models have a few tokens, the first of a text among them, in which single inputs of a down matrix
are thousands of times as large as usual (massive activations: Sun 2024, arXiv 2402.17762). Scaled by that magnitude,
the weights of such an input alone decide the scale of every output, and the other weights round to zero.

With alpha = 0.5 and the root mean squares of both, s minimizes sum (x / s)^2 sum (s w)^2 (Cauchy-Schwarz). The squared
rounding error is proportional to that where the largest magnitude is the same multiple of the root mean square
everywhere. Activations have longer tails than weights, so that 0.6 is better.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel

STATISTICS = {"shares": calibrate.SHARES, "tokens": calibrate.TOKENS}


def scales(size_x: jax.Array, most_w: jax.Array, alpha: float) -> jax.Array:
    """s = x^alpha / max|w|^(1 - alpha) for each input [K] of the size x; 1 where either is zero."""
    alive = (size_x > 0) & (most_w > 0)
    s = jnp.power(jnp.where(alive, size_x, 1.0), alpha) / jnp.power(jnp.where(alive, most_w, 1.0), 1 - alpha)
    return jnp.where(alive, jnp.clip(s, 1e-5, 1e5), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Move the range of activations into weights."""

    alpha: float = flag(0.6, "how much of it, in [0, 1]: 0.5 shares it, 1 makes all inputs equally large")

    at = "alpha"
    calibrates = True

    def __post_init__(self):
        require(0 <= self.alpha <= 1, f"alpha is {self.alpha}, but must be in [0, 1]")

    def __call__(self, model: LanguageModel, context: Context):
        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            params = layer.params
            for place in fold.places(layer.config):
                weights = dict(trees.flatten(params))
                matrices = [ops.dequantize(weights[path]) for path in place.readers]
                most_w = jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=1) for w in matrices]), axis=0)
                seen = read[place.readers[0]]
                size_x = jnp.sqrt(seen["shares"] / jnp.maximum(seen["tokens"], 1))
                shared = functools.partial(fold.shared, layer.config, place)
                s = scales(shared(size_x), shared(most_w), self.alpha)
                params = fold.scale_inputs(layer.config, params, place, s)
            return layer.replace(params=params), None

        given = {"mesh": context.mesh, "title": "SmoothQuant"}
        after, _ = calibrate.walk(model, context.calibration, one, STATISTICS, **given)
        return after, record(self, model, after, context)
