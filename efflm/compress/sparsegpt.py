"""SparseGPT (Frantar 2023, arXiv 2301.00774): pruning whose errors the remaining weights compensate for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress import calibrate, obs, select
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel


@functools.partial(jax.jit, static_argnums=(3, 4))
def prune(
    w: jax.Array,
    inverse: obs.Inverse,
    kept: jax.Array,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """w float32 [K, N] after SparseGPT, and its mask, True for what is kept.

    inverse: of what it reads (obs.inverse); weights of dead inputs go first. kept: False for what is pruned already.
    Of every obs.BLOCK inputs round(sparsity * weights) go, those with the least w^2 / U[k, k]^2; with a pattern (n, m),
    all but n of every m inputs of an output.
    """
    there = jnp.ones(w.shape[0], bool)
    together = pattern[1] if pattern else obs.BLOCK
    choose = _Choose(sparsity, pattern)
    parts = (there, inverse.dead, kept)  # inverse.order is that of the inputs
    return obs.compensated(jnp.where(kept, w, 0.0), inverse, parts, choose, _zeroed, together)


@dataclasses.dataclass(frozen=True)
class _Choose:
    """Which weights of some inputs are kept. Inputs that are not there are not counted."""

    sparsity: float
    pattern: tuple[int, int] | None

    def __call__(self, parts: Any, w: jax.Array, diagonal: jax.Array) -> jax.Array:
        there, dead, kept = parts
        score = jnp.where((there & ~dead)[:, None] & kept, jnp.square(w / diagonal[:, None]), 0.0)
        if self.pattern:
            return kept & ~select.all_but_n_of_m(score, *self.pattern)
        score = jnp.where(there[:, None], score, jnp.inf)
        count = jnp.round(self.sparsity * jnp.sum(there) * w.shape[1]).astype(jnp.int32)
        return kept & ~select.smallest(score.reshape(-1), count).reshape(w.shape)


def _zeroed(parts: Any, w: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, w, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(select.Pruner):
    """Prune the matrices inside the layers by what they do to calibration text, the remaining weights adjusted."""

    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean")

    def __post_init__(self):
        super().__post_init__()
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")

    def __call__(self, model: LanguageModel, context: Context):
        shares, pattern = self.chosen(model.params)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            inverse = obs.inverses(layer, read, self.damping)
            masks = dict(layer.masks)

            def matrix(path: str, leaf: Any) -> Any:
                share = shares.of(layer.path(path))
                if path not in read or share is None:
                    return leaf
                w = ops.in_float32(leaf)
                kept = masks.get(path, np.ones(w.shape, bool))
                w, masks[path] = prune(w, inverse(path), kept, share, pattern)
                return ops.requantize(w, leaf)

            params = trees.map_with_path(matrix, layer.params)
            return layer.replace(params=params, masks=masks), None

        given = {"mesh": context.mesh, "title": "SparseGPT"}
        after, _ = calibrate.walk(model, context.calibration, one, {"gram": calibrate.GRAM}, **given)
        return after, record(self, model, after, context)
