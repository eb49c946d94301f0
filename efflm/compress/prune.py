"""Magnitude pruning (Han 2015, arXiv 1506.02626): masks over the matrices inside the layers, and zeros where they drop.

Per layer: every matrix loses the same fraction. Global: one threshold over all of them. 2:4: in every four
consecutive inputs of an output the two smaller ones go (Mishra 2021, arXiv 2104.08378). Counts are exact under ties:
of equal magnitudes the earlier ones go first.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from efflm import trees
from efflm.compress.step import Context, record
from efflm.config import flag, require, require_sparsity
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops import Masks, apply_masks, dequantize

Scope = Literal["layer", "global", "2:4"]


@functools.partial(jax.jit, static_argnames="count")
def _smallest(magnitudes: jax.Array, count: int) -> jax.Array:
    """True for exactly `count` elements of a flat float32 array: the smallest, the earlier ones first among equals.

    The bits of a float that is not negative, read as an integer, are in the order of the floats: so 31 counts find
    the count-th smallest, which a sort of a large matrix takes far longer for.
    """
    if count == 0:
        return jnp.zeros(magnitudes.shape, bool)
    bits = lax.bitcast_convert_type(magnitudes, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the count-th smallest is in (low, high]
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, threshold = lax.fori_loop(0, 32, halve, (jnp.int32(-1), jnp.int32(0x7F800000)))  # up to infinity
    below, equal = bits < threshold, bits == threshold
    return below | (equal & (jnp.cumsum(equal) <= count - jnp.sum(below)))


@jax.jit
def _two_of_four(w: jax.Array) -> jax.Array:
    inputs, outputs = w.shape
    four = jnp.abs(w).reshape(inputs // 4, 4, outputs)
    one, other = four[:, :, None], four[:, None]  # every input of a group beside every other
    earlier = (jnp.arange(4)[:, None] > jnp.arange(4)[None])[None, :, :, None]
    rank = jnp.sum((other < one) | ((other == one) & earlier), axis=2)
    return (rank >= 2).reshape(inputs, outputs)


def magnitude_masks(params: Any, sparsity: float, scope: Scope = "layer") -> dict[str, jax.Array]:
    """{path: bool mask, True to keep} for the matrices [in, out] of the linear layers.

    Of n weights round(sparsity * n) are dropped, in each matrix ("layer") or in all together ("global"); for "2:4"
    sparsity must be 0.5. Raises InputError.
    """
    require_sparsity(sparsity)
    weights = {path: dequantize(leaf).astype(jnp.float32) for path, leaf in trees.flatten(params) if in_layer(path)}
    if scope == "2:4":
        require(sparsity == 0.5, f"sparsity is {sparsity}, but 2:4 always removes half: leave it at 0.5")
        for path, w in weights.items():
            require(w.shape[0] % 4 == 0, f"{path} has {w.shape[0]} inputs, which 2:4 cannot group by four")
        return {path: _two_of_four(w) for path, w in weights.items()}
    if scope == "layer":
        drop = lambda w: _smallest(jnp.abs(w).ravel(), round(sparsity * w.size)).reshape(w.shape)
        return {path: ~drop(w) for path, w in weights.items()}
    everything = jnp.concatenate([jnp.abs(w).ravel() for w in weights.values()])
    dropped, start, masks = _smallest(everything, round(sparsity * everything.size)), 0, {}
    for path, w in weights.items():
        masks[path], start = ~dropped[start : start + w.size].reshape(w.shape), start + w.size
    return masks


def joint(before: Masks, masks: Masks) -> dict[str, jax.Array]:
    """Masks that keep what both keep: what was pruned stays so."""
    before = before or {}
    return {**before, **{path: mask & before[path] if path in before else mask for path, mask in masks.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
    """Set the smallest weights of the matrices inside the layers to zero."""

    sparsity: float = flag(0.5, "fraction of weights to remove, in [0, 1)")
    scope: Literal["layer", "global", "2:4"] = flag("layer", "per matrix, over all matrices, or 2 of every 4 inputs")

    def __post_init__(self):
        require_sparsity(self.sparsity)

    def __call__(self, model: LanguageModel, context: Context):
        masks = joint(model.masks, magnitude_masks(model.params, self.sparsity, self.scope))
        after = model.replace(params=apply_masks(model.params, masks), masks=masks)
        return after, record(self, model, after, context)
