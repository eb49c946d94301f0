"""Casting to bfloat16, and int8 weights with one scale per output channel, round-to-nearest.

W8A16 leaves activations in floating point; W8A8 rounds them too, dynamically, one scale per token (as in LLM.int8(),
Dettmers 2022, arXiv 2208.07339, without its outlier path). The scheme is symmetric absmax.
"""

import dataclasses
from typing import Any, Literal

from efflm import trees
from efflm.compress.step import Context, record
from efflm.config import flag
from efflm.model import LanguageModel, in_dtype
from efflm.model.params import find, is_matrix
from efflm.ops.qarray import Activations, QArray, quantize_array


def quantize(params: Any, activations: Activations = "float") -> Any:
    """The tree with every matrix as a QArray; anything else as it was."""

    def one(path, w):
        if not is_matrix(path):
            return w
        if isinstance(w, QArray):
            return w.replace(activations=activations)
        return quantize_array(w, find(path)[0].contracted, activations)

    return trees.map_with_path(one, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Int8 matrices, round-to-nearest, per output channel."""

    activations: Literal["float", "int8"] = flag("float", "int8 also rounds activations, one scale per token (W8A8)")

    def __call__(self, model: LanguageModel, context: Context):
        after = model.replace(params=quantize(model.params, self.activations))
        return after, record(self, model, after, context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Every floating-point weight in another dtype."""

    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "dtype of the weights, and of their matmuls")

    def __call__(self, model: LanguageModel, context: Context):
        after = in_dtype(model, self.dtype)
        return after, record(self, model, after, context)
