"""Pruning while training (Zhu 2017, arXiv 1710.01878): the smallest weights go, more of them at each of many stages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from efflm import ops, trees
from efflm.config import require, require_sparsity
from efflm.model.params import in_layer, is_stacked
from efflm.ops.selection import smallest


class GradualState(NamedTuple):
    """count: steps so far. masks: as ops.mask_tree's, True where a weight is kept. rule: the state of the rule."""

    count: jax.Array
    masks: Any
    rule: Any


def cubic(final: float, progress: float) -> float:
    """The sparsity at a progress from 0 to 1 (equation 1, from a dense start): steep first, flat at the end."""
    return final * (1 - (1 - progress) ** 3)


def stages(steps: int, every: int) -> int:
    """How often the sparsity rises in so many steps; the last time is after stages * every of them."""
    return max(1, steps // every)


def gradual(
    rule: optax.GradientTransformation,
    sparsity: float,
    *,
    steps: int,
    every: int = 10,
) -> optax.GradientTransformation:
    """The rule with the smallest weights of each matrix set to zero, their share rising to `sparsity` over `steps`.

    After i * every steps, i up to S = stages(steps, every), masks are made of the magnitudes of the weights: exactly
    round(cubic(sparsity, i / S) * n) of n weights are dropped, those dropped before first, since they are zero. Their
    gradients do not reach the rule, and their update is minus the weight: they become exactly zero at once and stay so.
    Raises InputError.
    """
    require_sparsity(sparsity)
    require(every > 0, f"every is {every}, but must be positive")
    require(steps > 0, f"the sparsity rises over {steps} steps, but they must be positive")
    last = stages(steps, every)

    def init(params: Any) -> GradualState:
        masks = trees.map_with_path(lambda path, w: jnp.ones(w.shape, bool) if in_layer(path) else None, params)
        return GradualState(jnp.zeros((), jnp.int32), masks, rule.init(params))

    def update(updates: Any, state: GradualState, params: Any = None) -> tuple[Any, GradualState]:
        if params is None:
            raise ValueError("gradual pruning reads the weights: call update with params")
        stage = state.count // every
        masks = lax.cond((state.count % every == 0) & (stage <= last), lambda: made(params, stage), lambda: state.masks)
        updates, inner = rule.update(ops.masked(updates, masks), state.rule, params)
        dropped = lambda mask, update, w: update if mask is None else jnp.where(mask, update, -w.astype(update.dtype))
        updates = jax.tree.map(dropped, masks, updates, params, is_leaf=lambda node: node is None)
        return updates, GradualState(state.count + 1, masks, inner)

    def made(params: Any, stage: jax.Array) -> Any:
        def one(path: str, w: jax.Array) -> jax.Array | None:
            if not in_layer(path):
                return None
            each = jax.vmap(mask) if is_stacked(path) else mask
            return each(w)

        def mask(w: jax.Array) -> jax.Array:
            # Of whole numbers made beforehand: float32 does not count beyond 2^24.
            counts = np.array([round(cubic(sparsity, i / last) * w.size) for i in range(last + 1)], np.int32)
            scores = jnp.abs(w.astype(jnp.float32)).reshape(-1)
            return ~smallest(scores, jnp.asarray(counts)[stage]).reshape(w.shape)

        return trees.map_with_path(one, params)

    return optax.GradientTransformation(init, update)
