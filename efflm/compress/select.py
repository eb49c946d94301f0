"""Which weights go: exact counts, also under ties; of equal scores the earlier ones go first."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.config import require
from efflm.model.params import in_layer
from efflm.ops.selection import smallest


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


def require_share(sparsity: float, pattern: tuple[int, int] | None) -> None:
    """Raise InputError where a pattern (n, m) removes another share than `sparsity`."""
    if pattern:
        n, m = pattern
        share = 1 - n / m
        require(
            abs(sparsity - share) < 1e-6,
            f"sparsity is {sparsity}, but {n}:{m} removes {share:g} of the weights: say that",
        )


def require_groups(params: Any, pattern: tuple[int, int] | None) -> None:
    """Raise InputError for a matrix inside the layers that a pattern (n, m) does not divide."""
    for path, w in trees.flatten(params):
        if pattern and in_layer(path):
            n, m = pattern
            require(
                w.shape[0] % m == 0,
                f"{path} has {w.shape[0]} inputs, which {n}:{m} cannot group by {m}: choose another pattern",
            )
