"""How a weight is used. What a weight is, and which kernel runs on it, is known here and nowhere else."""

from efflm.ops.attention import attention
from efflm.ops.cached_attention import cached_attention
from efflm.ops.cross_entropy import cross_entropy
from efflm.ops.distillation import cached_distillation, distillation
from efflm.ops.divergences import Divergence
from efflm.ops.dot import dot, dots
from efflm.ops.embed import embed, unembed
from efflm.ops.feedforward import Activation, gated, gated_feedforward
from efflm.ops.format import Format
from efflm.ops.lowrank import LowRank
from efflm.ops.masks import Masks, apply_masks, mask_tree, masked
from efflm.ops.norm import Normed, normalize
from efflm.ops.possible import LEAST, possible
from efflm.ops.prepare import prepare, prepared
from efflm.ops.probabilities import attention_probabilities
from efflm.ops.qarray import QArray, dequantize, in_float32, quantize_array, requantize, straight_through, take
from efflm.ops.rotary import rotate
from efflm.ops.soft_cap import soft_cap
from efflm.ops.storage import is_coded, nonzeros, stored_nbytes
