"""SmoothQuant (Xiao 2022, arXiv 2211.10438): the outliers of activations made smaller, and the weights that read them
larger, so that both are easier to round. The model computes the same.

The paper shares the range between both (alpha 0.5) in OPT and BLOOM; models whose weights have narrow ranges take more.
0.7 was better than 0.5 on both Llama models that it was tried on here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel


def scales(most_x: jax.Array, most_w: jax.Array, alpha: float) -> jax.Array:
    """s = max|x|^alpha / max|w|^(1 - alpha) for each input [K]; 1 where either is zero."""
    alive = (most_x > 0) & (most_w > 0)
    s = jnp.power(jnp.where(alive, most_x, 1.0), alpha) / jnp.power(jnp.where(alive, most_w, 1.0), 1 - alpha)
    return jnp.where(alive, jnp.clip(s, 1e-5, 1e5), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Move the range of activations into weights."""

    alpha: float = flag(0.7, "how much of it, in [0, 1]: 0.5 shares it, 1 makes all inputs equally large")

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
                most_x = fold.shared(layer.config, place, read[place.readers[0]]["largest"])
                s = scales(most_x, fold.shared(layer.config, place, most_w), self.alpha)
                params = fold.scale_inputs(layer.config, params, place, s)
            return layer.replace(params=params), None

        given = {"mesh": context.mesh, "title": "SmoothQuant"}
        after, _ = calibrate.walk(model, context.calibration, one, {"largest": calibrate.LARGEST}, **given)
        return after, record(self, model, after, context)
