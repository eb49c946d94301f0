"""How a weight is used. What a weight is, and which kernel runs on it, is known here and nowhere else."""

from efflm.ops.attention import attention
from efflm.ops.cross_entropy import cross_entropy
from efflm.ops.distillation import distillation
from efflm.ops.dot import dot
from efflm.ops.embed import embed, unembed
from efflm.ops.masks import Masks, apply_masks, mask_tree, masked
from efflm.ops.prepare import prepare
from efflm.ops.qarray import QArray, dequantize, quantize_array, requantize, straight_through, take
from efflm.ops.storage import nonzeros, stored_nbytes

__all__ = [
    "Masks",
    "QArray",
    "apply_masks",
    "attention",
    "cross_entropy",
    "dequantize",
    "distillation",
    "dot",
    "embed",
    "mask_tree",
    "masked",
    "nonzeros",
    "prepare",
    "quantize_array",
    "requantize",
    "stored_nbytes",
    "straight_through",
    "take",
    "unembed",
]
