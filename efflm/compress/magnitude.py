"""Magnitude pruning (Han 2015, arXiv 1506.02626): masks over the matrices inside the layers, and zeros where they drop.

Per layer: every matrix loses the same fraction. Global: one threshold over all of them. N:M: of every M consecutive
inputs of an output the N largest stay (Mishra 2021, arXiv 2104.08378). Tiles: whole squares go, those with the least
sum of squares (Gray 2017). Counts are exact under ties: of equal magnitudes the earlier ones go first.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.compress import select
from efflm.compress.plan import Plan
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops import apply_masks, in_float32


@functools.partial(jax.jit, static_argnames="size")
def _tiles(w: jax.Array, size: int) -> jax.Array:
    """Sums of squares of the tiles of size x size weights."""
    inputs, outputs = w.shape
    return jnp.sum(jnp.square(w.reshape(inputs // size, size, outputs // size, size)), axis=(1, 3))


def tile_size(scope: str) -> int | None:
    """16 of "16x16"; None for what is no such scope. Raises InputError."""
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", scope)
    if found is None:
        return None
    require(found[1] == found[2] and int(found[1]) > 1, f"scope is {scope}, but tiles are square: say 16x16")
    return int(found[1])


def magnitude_masks(
    params: Any, sparsity: float, scope: str = "layer", plan: Plan | None = None
) -> dict[str, jax.Array]:
    """{path: bool mask, True to keep} for the matrices [in, out] of the linear layers.

    Of n weights round(sparsity * n) are dropped, in each matrix ("layer") or in all together ("global"); "N:M" keeps N
    of every M inputs of an output; "BxB" drops round(sparsity * tiles) tiles of B x B weights. plan: of the sparsity of
    each matrix, in place of one for all. Raises InputError.
    """
    shares, pattern, size = shares_for(sparsity, scope, plan), select.n_of_m(scope), tile_size(scope)
    chosen = lambda path: in_layer(path) and shares.of(path) is not None
    weights = {path: in_float32(leaf) for path, leaf in trees.flatten(params) if chosen(path)}
    if pattern:
        select.require_groups(params, shares, pattern)
        return {path: ~select.all_but_n_of_m(jnp.abs(w), *pattern) for path, w in weights.items()}
    if size:
        for path, w in weights.items():
            fits = w.shape[0] % size == 0 and w.shape[1] % size == 0
            require(
                fits, f"{path} is {w.shape[0]} x {w.shape[1]}, which tiles of {scope} do not divide: say a smaller one"
            )
        return {
            path: jnp.repeat(jnp.repeat(select.kept(_tiles(w, size), shares.of(path)), size, 0), size, 1)
            for path, w in weights.items()
        }
    if scope == "layer":
        return {path: select.kept(jnp.abs(w), shares.of(path)) for path, w in weights.items()}
    everything = select.kept(jnp.concatenate([jnp.abs(w).ravel() for w in weights.values()]), sparsity)
    start, masks = 0, {}
    for path, w in weights.items():
        masks[path], start = everything[start : start + w.size].reshape(w.shape), start + w.size
    return masks


def shares_for(sparsity: float, scope: str, plan: Plan | None) -> Plan:
    """The sparsity of each matrix. Raises InputError for no scope, or another sparsity than its pattern's."""
    pattern, size = select.n_of_m(scope), tile_size(scope)
    require(
        scope in ("layer", "global") or bool(pattern) or bool(size),
        f"scope is {scope!r}, but must be layer, global, a pattern such as 2:4, or tiles such as 16x16",
    )
    require(plan is None or scope != "global", "scope is global, which has one threshold: leave the plan out")
    return select.shares_of(sparsity, pattern, plan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Set the smallest weights of the matrices inside the layers to zero."""

    sparsity: float = flag(0.5, "fraction of weights to remove, in [0, 1)")
    scope: str = flag(
        "layer", "layer: of each matrix; global: of all together; 2:4: 2 of every 4 inputs; 16x16: whole tiles"
    )
    plan: Plan | None = flag(None, select.OF_PLAN, internal=True)

    at = functools.partial(select.share_or_pattern, field="scope")

    def __post_init__(self):
        shares_for(self.sparsity, self.scope, self.plan)

    def __call__(self, model: LanguageModel, context: Context):
        masks = select.joint(model.masks, magnitude_masks(model.params, self.sparsity, self.scope, self.plan))
        after = model.replace(params=apply_masks(model.params, masks), masks=masks)
        return after, record(self, model, after, context)
