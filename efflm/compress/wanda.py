"""Wanda (Sun 2023, arXiv 2306.11695): of each output the weights go whose |w| * ||x|| is least, ||x|| the norm of the
input over the calibration text. No weight is changed otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, select
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require_sparsity
from efflm.model import LanguageModel


@functools.partial(jax.jit, static_argnums=(2, 3))
def mask(w: jax.Array, squares: jax.Array, sparsity: float, pattern: tuple[int, int] | None = None) -> jax.Array:
    """The mask, True to keep, of w float32 [K, N], whose inputs have the sums of squares [K].

    Of the K weights of each output round(sparsity * K) go, or all but n of every m with a pattern (n, m).
    """
    score = jnp.abs(w) * jnp.sqrt(squares)[:, None]
    if pattern:
        return ~select.all_but_n_of_m(score, *pattern)
    return ~select.smallest_of_outputs(score, round(sparsity * w.shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda:
    """Prune the matrices inside the layers by the magnitude of weights times that of what they read."""

    sparsity: float = flag(0.5, "fraction of weights to remove, in [0, 1)")
    pattern: str = flag("", "N:M keeps N of every M inputs of an output, as in 2:4; empty: any weights")

    at = staticmethod(select.share_or_pattern)
    calibrates = True

    def __post_init__(self):
        require_sparsity(self.sparsity)
        select.require_share(self.sparsity, select.n_of_m(self.pattern))

    def __call__(self, model: LanguageModel, context: Context):
        pattern = select.n_of_m(self.pattern)
        select.require_groups(model.params, pattern)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            weights, masks = dict(trees.flatten(layer.params)), dict(layer.masks)
            for path, states in read.items():
                w = jnp.where(masks.get(path, True), ops.in_float32(weights[path]), 0.0)
                kept = mask(w, states["squares"], self.sparsity, pattern)
                masks[path] = kept & masks[path] if path in masks else kept
            return layer.replace(params=ops.apply_masks(layer.params, masks), masks=masks), None

        statistics = {"squares": calibrate.SQUARES}
        after, _ = calibrate.walk(model, context.calibration, one, statistics, mesh=context.mesh, title="Wanda")
        return after, record(self, model, after, context)
