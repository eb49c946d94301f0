"""Rounding weights to the nearest code, and casting to bfloat16.

Weight-only quantization (W8A16) leaves activations in floating point; W8A8 rounds them too: dynamically, one scale per
token (as in LLM.int8(), Dettmers 2022, arXiv 2208.07339, without its outlier path), or with a static scale for each
matrix, from the largest activation over calibration text.
"""

import dataclasses
from typing import Any, Literal

from efflm import trees
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.plan import Plan, Rounder, nearest, plan_of
from efflm.compress.step import Context, record
from efflm.config import flag
from efflm.model import LanguageModel, in_dtype
from efflm.ops.format import Activations, Bits, Format
from efflm.ops.grid import symmetric_scale


def quantize(params: Any, activations: Activations = "float", **format: Any) -> Any:
    """The tree with all matrices in one format; of those that are QArrays already only the activations change."""
    return nearest(params, Plan(((".*", Format(activations=activations, **format)),)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Rounder):
    """Matrices rounded to the nearest code."""

    bits: Bits = flag(8, "bits of a weight")
    group: int = flag(0, "inputs that share a scale; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "below 8 bits choose the range of each scale by the least weighted error")
    scales: Literal["output", "matrix"] = flag("output", "whether outputs have scales of their own, or a matrix one")
    activations: Activations = flag(
        "float", "int8 also rounds activations, one scale per token (W8A8); int8_static: one per matrix, calibrated"
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
        """The weights of the layers with the scale of what each reads: its largest magnitude / 127."""
        plan = plan_of(self)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            def matrix(path: str, w: Any) -> Any:
                format = plan.of(layer.path(path))
                if path not in read or format is None or format.activations != "int8_static":
                    return w
                most = read[path]["largest"]
                scale = symmetric_scale(most.max(), 127).reshape(1, 1)
                return w.replace(activations="int8_static", activation_scale=scale)

            return layer.replace(params=trees.map_with_path(matrix, layer.params)), None

        given = {"mesh": context.mesh, "title": "static activation scales"}
        return calibrate.walk(model, context.calibration, one, {"largest": calibrate.LARGEST}, **given)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Every floating-point weight in another dtype."""

    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "dtype of the weights, and of their matmuls")

    at = "dtype"

    def __call__(self, model: LanguageModel, context: Context):
        after = in_dtype(model, self.dtype)
        return after, record(self, model, after, context)
