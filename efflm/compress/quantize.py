"""Rounding weights to the nearest code, and casting to bfloat16.

Weight-only quantization (W8A16) leaves activations in floating point; W8A8 rounds them too: dynamically, one scale per
token (as in LLM.int8(), Dettmers 2022, arXiv 2208.07339, without its outlier path), or with a static scale for each
matrix, from the largest activation over calibration text. Where single tokens are much larger than the others, one
scale for all rounds these away, so that matrices which read them keep the scales of tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer, Statistic
from efflm.compress.plan import ENTROPY, Plan, Rounder, nearest, plan_of
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel, in_dtype
from efflm.ops.format import Activations, Bits, Format
from efflm.ops.grid import symmetric_scale


def quantize(params: Any, activations: Activations = "float", **format: Any) -> Any:
    """The tree with all matrices in one format; of those that are QArrays already only the activations change."""
    return nearest(params, Plan(((".*", Format(activations=activations, **format)),)))


# Of what a matrix reads, summed over tokens: 1 / the square of a token's largest magnitude; 0 of one that is all zero.
INVERSE_SQUARES = Statistic(
    lambda _: jnp.float32(0),
    lambda total, x, _: total + jnp.sum(jnp.where(most(x) > 0, 1 / jnp.square(jnp.maximum(most(x), 1e-15)), 0.0)),
)
STATISTICS = {"largest": calibrate.LARGEST, "inverse_squares": INVERSE_SQUARES, "tokens": calibrate.TOKENS}


def most(x: jax.Array) -> jax.Array:
    """The largest magnitude of each token, [n, K] -> [n]."""
    return jnp.max(jnp.abs(x), axis=1)


def static_error(read: Mapping[str, jax.Array]) -> jax.Array:
    """How many times the squared error of rounding an activation grows, on average over tokens, where all tokens have
    the scale of the largest in place of their own."""
    return jnp.square(jnp.max(read["largest"])) * read["inverse_squares"] / jnp.maximum(read["tokens"], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Rounder):
    """Matrices rounded to the nearest code."""

    bits: Bits = flag(8, "bits of a weight")
    group: int = flag(0, "inputs that share a scale; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "below 8 bits choose the range of each scale by the least weighted error")
    scales: Literal["output", "matrix"] = flag("output", "whether outputs have scales of their own, or a matrix one")
    entropy: float = flag(0.0, ENTROPY)
    activations: Activations = flag(
        "float", "int8 also rounds activations, one scale per token (W8A8); int8_static: one per matrix, calibrated"
    )
    static_error: float = flag(
        16.0,
        "of int8_static: a matrix where activations would have more than so many times the squared rounding error that "
        "they have with one scale per token keeps these; 0: none does",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.static_error >= 0, f"static_error is {self.static_error}, but must be positive, or 0 for no bound: 16"
        )

    @staticmethod
    def at(value: str) -> dict[str, str]:
        return {"bits": value, "group": "32"}

    @property
    def calibrates(self) -> bool:
        return any(format and format.activations == "int8_static" for _, format in plan_of(self).rules)

    def __call__(self, model: LanguageModel, context: Context):
        after = model.replace(params=nearest(model.params, plan_of(self)))
        if self.calibrates:
            after = self.with_static_scales(after, context)
        return after, record(self, model, after, context)

    def with_static_scales(self, model: LanguageModel, context: Context) -> LanguageModel:
        """The weights of the layers with the scale of what each reads, its largest magnitude / 127, where that costs no
        more than the field `static_error` says."""
        plan = plan_of(self)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            def matrix(path: str, w: Any) -> Any:
                format = plan.of(layer.path(path))
                if path not in read or format is None or format.activations != "int8_static":
                    return w
                if self.static_error and static_error(read[path]) > self.static_error:
                    return w
                scale = symmetric_scale(jnp.max(read[path]["largest"]), 127).reshape(1, 1)
                return w.replace(activations="int8_static", activation_scale=scale)

            return layer.replace(params=trees.map_with_path(matrix, layer.params)), None

        given = {"mesh": context.mesh, "title": "static activation scales"}
        return calibrate.walk(model, context.calibration, one, STATISTICS, **given)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Every floating-point weight in another dtype."""

    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "dtype of the weights, and of their matmuls")

    at = "dtype"

    def __call__(self, model: LanguageModel, context: Context):
        after = in_dtype(model, self.dtype)
        return after, record(self, model, after, context)
