"""How a weight is used. What a weight is, and which kernel runs on it, is known here and nowhere else."""

from efflm.ops.attention import attention
from efflm.ops.cross_entropy import cross_entropy
from efflm.ops.distillation import distillation
from efflm.ops.dot import dot
from efflm.ops.embed import embed, unembed
from efflm.ops.qarray import QArray, dequantize, quantize_array

__all__ = [
    "QArray",
    "attention",
    "cross_entropy",
    "dequantize",
    "distillation",
    "dot",
    "embed",
    "quantize_array",
    "unembed",
]
