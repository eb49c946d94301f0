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
from efflm.compress.step import Context, record
from efflm.config import flag
from efflm.model import LanguageModel, in_dtype
from efflm.model.params import find, in_layer, is_matrix
from efflm.ops import qarray
from efflm.ops.qarray import Activations, QArray, quantize_array

Where = Literal["all", "layers", "embeddings"]


def quantize(params: Any, activations: Activations = "float", where: Where = "all", **format: Any) -> Any:
    """The tree with matrices as QArrays: of the layers, of the embeddings (with the unembedding), or all; of those that
    are QArrays already only `activations` changes. format: see ops.qarray.quantize_array."""

    def one(path: str, w: Any) -> Any:
        if not is_matrix(path) or where == ("embeddings" if in_layer(path) else "layers"):
            return w
        if isinstance(w, QArray):
            return w.replace(activations=activations, activation_scale=None)
        return quantize_array(w, find(path)[0].contracted, activations, **format)

    return trees.map_with_path(one, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Matrices rounded to the nearest code."""

    bits: Literal[8, 4, 3] = flag(8, "bits of a weight")
    group: int = flag(0, "inputs that share a scale; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(False, "choose the range of each scale by the least squared error")
    scales: Literal["output", "matrix"] = flag("output", "whether outputs have scales of their own, or a matrix one")
    activations: Activations = flag(
        "float", "int8 also rounds activations, one scale per token (W8A8); int8_static: one per matrix, calibrated"
    )
    where: Where = flag("all", "matrices of the layers, of the embeddings, or all")

    @staticmethod
    def at(value: str) -> dict[str, str]:
        return {"bits": value, "group": "32", "where": "layers"}

    def __post_init__(self):
        qarray.require_format(self.bits, self.group)

    @property
    def calibrates(self) -> bool:
        return self.activations == "int8_static"

    def __call__(self, model: LanguageModel, context: Context):
        names = ("bits", "group", "symmetric", "clip", "scales")
        format = {name: getattr(self, name) for name in names}
        if self.activations == "int8_static":
            # Embeddings are no linear layers of a block, whose inputs are calibrated: their scales stay dynamic.
            params = quantize(model.params, "int8", self.where, **format)
            if self.where != "embeddings":
                params = self.with_static_scales(model.replace(params=params), context)
        else:
            params = quantize(model.params, self.activations, self.where, **format)
        after = model.replace(params=params)
        return after, record(self, model, after, context)

    def with_static_scales(self, model: LanguageModel, context: Context) -> Any:
        """The weights of the layers with the scale of what each reads: its largest magnitude / 127."""

        def one(layer: Layer, read: calibrate.States) -> Layer:
            def matrix(path: str, w: Any) -> Any:
                if path not in read:
                    return w
                most = read[path]["largest"]
                scale = qarray.symmetric_scale(most.max(), 127).reshape(1, 1)
                return w.replace(activations="int8_static", activation_scale=scale)

            return layer.replace(params=trees.map_with_path(matrix, layer.params))

        statistics = {"largest": calibrate.LARGEST}
        after = calibrate.map_blocks(
            model, context.calibration, statistics, one, mesh=context.mesh, title="static activation scales"
        )
        return after.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Every floating-point weight in another dtype."""

    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "dtype of the weights, and of their matmuls")

    at = "dtype"

    def __call__(self, model: LanguageModel, context: Context):
        after = in_dtype(model, self.dtype)
        return after, record(self, model, after, context)
