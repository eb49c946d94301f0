"""Which weights go: exact counts, also under ties; of equal scores the earlier ones go first."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.compress.plan import LAYERS, Plan, require_plan
from efflm.config import flag, require, require_sparsity
from efflm.model.params import in_layer
from efflm.ops import Masks
from efflm.ops.selection import smallest

OF_PLAN = "a compress.plan.Plan of such fractions by path, in place of one for all; None there: not pruned"


def kept(scores: jax.Array, sparsity: float) -> jax.Array:
    """True for all but round(sparsity * scores) of them: the smallest."""
    return ~smallest(scores.ravel(), round(sparsity * scores.size)).reshape(scores.shape)


def joint(before: Masks, masks: Masks) -> dict[str, jax.Array]:
    """Masks that keep what both keep: what was pruned stays so."""
    before = before or {}
    return {**before, **{path: mask & before[path] if path in before else mask for path, mask in masks.items()}}


@jax.jit
def smallest_of_outputs(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """True for exactly `count` inputs of each output of scores [in, out]: the smallest."""
    return jax.vmap(functools.partial(smallest, count=count), in_axes=1, out_axes=1)(scores)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def all_but_n_of_m(scores: jax.Array, n: int, m: int) -> jax.Array:
    """True for the m - n smallest of every m consecutive inputs of each output of scores [in, out]."""
    inputs, outputs = scores.shape
    groups = scores.reshape(inputs // m, m, outputs)
    one, other = groups[:, :, None], groups[:, None]  # every input of a group beside every other
    earlier = (jnp.arange(m)[:, None] > jnp.arange(m)[None])[None, :, :, None]
    rank = jnp.sum((other < one) | ((other == one) & earlier), axis=2)
    return (rank < m - n).reshape(inputs, outputs)


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """(2, 4) of "2:4": two of every four inputs are kept; None for what is no such pattern. Raises InputError."""
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    if found is None:
        return None
    n, m = map(int, found.groups())
    require(0 < n < m, f"{pattern} keeps {n} of every {m} inputs, but must keep at least one and not all: as in 2:4")
    return n, m


def share_or_pattern(value: str, field: str = "pattern") -> dict[str, str]:
    """The settings that a value after @ sets of a step that prunes: wanda@0.5, wanda@2:4. field: of the pattern."""
    pattern = n_of_m(value)
    return {"sparsity": str(1 - pattern[0] / pattern[1]), field: value} if pattern else {"sparsity": value}


def shares_of(sparsity: float, pattern: tuple[int, int] | None, plan: Plan | None) -> Plan:
    """The share of the weights that goes of each matrix inside the layers: `sparsity`, or what the plan says.

    Raises InputError for one that is none, or that a pattern (n, m) does not remove.
    """
    if plan is not None:
        require_plan(plan, float, "shares, as 0.5")
    shares = Plan(((LAYERS, sparsity),)) if plan is None else plan
    for share in (share for _, share in shares.rules if share is not None):
        require_sparsity(share)
        if pattern:
            n, m = pattern
            require(
                abs(share - (1 - n / m)) < 1e-6,
                f"sparsity is {share}, but {n}:{m} removes {1 - n / m:g} of the weights: say that",
            )
    return shares


def require_groups(params: Any, shares: Plan, pattern: tuple[int, int] | None) -> None:
    """Raise InputError for a matrix that is to be pruned by a pattern (n, m) which does not divide it."""
    for path, w in trees.flatten(params):
        if pattern and in_layer(path) and shares.of(path) is not None:
            n, m = pattern
            require(
                w.shape[0] % m == 0,
                f"{path} has {w.shape[0]} inputs, which {n}:{m} cannot group by {m}: choose another pattern",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruner:
    """The settings that steps which prune by calibration text have in common."""

    sparsity: float = flag(0.5, "fraction of weights to remove, in [0, 1)")
    pattern: str = flag("", "N:M keeps N of every M inputs of an output, as in 2:4; empty: any weights")
    plan: Plan | None = flag(None, OF_PLAN, internal=True)

    at = staticmethod(share_or_pattern)
    calibrates = True

    def __post_init__(self):
        shares_of(self.sparsity, n_of_m(self.pattern), self.plan)

    def chosen(self, params: Any) -> tuple[Plan, tuple[int, int] | None]:
        """The share of each matrix, and the pattern. Raises InputError for a matrix that it does not divide."""
        pattern = n_of_m(self.pattern)
        shares = shares_of(self.sparsity, pattern, self.plan)
        require_groups(params, shares, pattern)
        return shares, pattern
