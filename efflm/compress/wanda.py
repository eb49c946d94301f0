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
from efflm.model import LanguageModel


@functools.partial(jax.jit, static_argnums=(2, 3))
def mask(w: jax.Array, squares: jax.Array, sparsity: float, pattern: tuple[int, int] | None = None) -> jax.Array:
    """The mask, True to keep, of w float32 [K, N], whose inputs have the sums of squares [K].

    Of the K weights of each output round(sparsity * K) go, or all but n of every m with a pattern (n, m).
    """
    squares = jnp.where(jnp.any(squares > 0), squares, 1.0)  # an expert that no text reaches goes by magnitude
    score = jnp.abs(w) * jnp.sqrt(squares)[:, None]
    if pattern:
        return ~select.all_but_n_of_m(score, *pattern)
    return ~select.smallest_of_outputs(score, round(sparsity * w.shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(select.Pruner):
    """Prune the matrices inside the layers by the magnitude of weights times that of what they read."""

    def __call__(self, model: LanguageModel, context: Context):
        shares, pattern = self.chosen(model.params)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            weights, masks = dict(trees.flatten(layer.params)), {}
            for path, states in read.items():
                share = shares.of(layer.path(path))
                if share is None:
                    continue
                w = jnp.where(layer.masks.get(path, True), ops.in_float32(weights[path]), 0.0)
                masks[path] = mask(w, states["squares"], share, pattern)
            masks = select.joint(layer.masks, masks)
            return layer.replace(params=ops.apply_masks(layer.params, masks), masks=masks), None

        statistics = {"squares": calibrate.SQUARES}
        after, _ = calibrate.walk(model, context.calibration, one, statistics, mesh=context.mesh, title="Wanda")
        return after, record(self, model, after, context)
