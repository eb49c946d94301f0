"""Changing a matrix one input after another, the later inputs made to compensate for what was lost.

This is the optimal brain surgeon (Hassibi 1993) for a linear layer, in the form of Frantar 2022 (arXiv 2210.17323):
with H = X^T X of the layer's inputs and U the upper Cholesky factor of the inverse of H, an error e in input k of an
output is divided by U[k, k] and times U[k, j] taken off every later input j.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efflm.compress.calibrate import Layer, States
from efflm.config import require

BLOCK = 128  # inputs whose errors reach those after all of them together
PART = 16  # of these, inputs whose errors reach the others of the block together
MOST_DAMPING = 1.0


class Inverse(NamedTuple):
    """The inverse of X^T X as `compensated` reads it.

    order: int [K], the inputs as they are visited. upper: float32 [K, K] in that order, U with U^T U the inverse. dead:
    bool [K] in that order, inputs that are always zero.
    """

    order: jax.Array
    upper: jax.Array
    dead: jax.Array


def inverse(gram: jax.Array, damping: float, what: str, sort: bool = False) -> Inverse:
    """Of gram + damping * (mean of its diagonal), float32 [K, K]. sort: visit the inputs with the most X^T X first.

    Inputs that are always zero are dead: they get a diagonal of 1 and compensate for nothing. Where the sum is
    singular in float32, the damping is made ten times as large until it is not. Raises InputError beyond 1.
    """
    while True:
        made, finite = _inverse(gram, damping, sort)
        if finite:
            return made
        damping *= 10
        require(
            damping <= MOST_DAMPING,
            f"what {what} reads gives a matrix that cannot be inverted: use more calibration text, or more damping",
        )


@functools.partial(jax.jit, static_argnums=2)
def _inverse(gram: jax.Array, damping: jax.Array, sort: bool) -> tuple[Inverse, jax.Array]:
    """And whether it is finite."""
    K = gram.shape[0]
    order = jnp.argsort(-jnp.diag(gram)) if sort else jnp.arange(K)
    gram = gram[order][:, order]
    dead = jnp.diag(gram) == 0
    mean = jnp.sum(jnp.diag(gram)) / jnp.maximum(jnp.sum(~dead), 1)
    hessian = gram + jnp.diag(jnp.where(dead, 1.0, damping * mean))
    # The lower factor of the matrix read backwards, read backwards, is upper: H = R R^T, and U is the inverse of R.
    backwards = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    upper = lax.linalg.triangular_solve(backwards, jnp.eye(K), left_side=True, lower=False)
    return Inverse(order, upper, dead), jnp.all(jnp.isfinite(upper))


def inverses(layer: Layer, read: States, damping: float, sort: bool = False) -> Callable[[str], Inverse]:
    """path in the layer -> `inverse` of what that matrix reads, made once for matrices that read the same.

    read: has a "gram" for each.
    """
    made: dict[int, Inverse] = {}

    def of(path: str) -> Inverse:
        gram = read[path]["gram"]
        if id(gram) not in made:
            made[id(gram)] = inverse(gram, damping, f"block_{layer.index}/{path}", sort)
        return made[id(gram)]

    return of


@jax.jit
def corrected(w: jax.Array, inverse: Inverse, shift: jax.Array, strength: float) -> jax.Array:
    """w float32 [K, N] + strength * H^-1 shift w. shift: X^T (X0 - X), where X0 is read in the model as it was.

    With strength 1 and no damping these weights give of X what is nearest to X0 w by least squares (QEP: Arai 2025,
    arXiv 2504.09629): rounding them makes up for what was lost before.
    """
    toward = jnp.matmul(shift, w, precision="highest")[inverse.order]
    for factor in (inverse.upper, inverse.upper.T):
        toward = jnp.matmul(factor, toward, precision="highest")
    return w + strength * jnp.zeros_like(w).at[inverse.order].set(toward)


# parts of m inputs, their weights [m, N], the diagonal of U [m] -> which are kept, bool [m, N].
Choose = Callable[[Any, jax.Array, jax.Array], jax.Array]
# parts of an input, its weights [N], which are kept [N] -> the weights that it gets, [N].
After = Callable[[Any, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def compensated(
    w: jax.Array, inverse: Inverse, parts: Any, choose: Choose, after: After, together: int = BLOCK
) -> tuple[jax.Array, jax.Array]:
    """w float32 [K, N] with one input after another replaced by `after`, each error compensated by the later inputs;
    and which weights were kept, bool [K, N].

    parts: arrays that lead with an axis of K. choose is called for each `together` inputs when all before them are
    done; inputs that are missing for the last time are zeros. choose and after are compiled: equal ones once.
    """
    (K, N), (w, parts) = w.shape, jax.tree.map(lambda array: array[inverse.order], (w, parts))
    block = max(BLOCK // together, 1) * together
    part = together if together % PART else PART
    padded = -(-K // block) * block
    fill = lambda array: jnp.pad(array, ((0, padded - K), *((0, 0),) * (array.ndim - 1)))
    w, parts = fill(w), jax.tree.map(fill, parts)
    factor = jnp.pad(inverse.upper, ((0, padded - K),) * 2) + jnp.diag(jnp.where(jnp.arange(padded) < K, 0.0, 1.0))
    take = lambda array, start, size=together: lax.dynamic_slice_in_dim(array, start, size)
    at_once = lambda tree, start: jax.tree.map(lambda array: take(array, start), tree)

    def passed_on(reach: jax.Array, start: jax.Array, errors: jax.Array) -> jax.Array:
        """What these errors take off the inputs from start on."""
        later = jnp.where(jnp.arange(reach.shape[1]) >= start, reach, 0.0)
        return jnp.matmul(later.T, errors, precision="highest")

    def one_block(b: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (w, kept), start = held, b * block
        reach = take(factor, start, block)  # [block, padded]: how much each later input compensates
        own = lax.dynamic_slice_in_dim(reach, start, block, axis=1)
        diagonal = jnp.diag(own)

        def one_group(g: jax.Array, held: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            (rows, errors, kept), first = held, g * together
            here = at_once(parts, start + first)
            chosen = choose(here, take(rows, first), take(diagonal, first))

            def one_part(p: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                (rows, errors), at = held, first + p * part
                reach = take(own, at, part)
                inside = lax.dynamic_slice_in_dim(reach, at, part, axis=1)

                def one_input(i: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    (rows, errors), k = held, p * part + i
                    new = after(jax.tree.map(lambda array: array[k], here), rows[i], chosen[k])
                    error = (rows[i] - new) / inside[i, i]
                    rows = rows - inside[i][:, None] * error[None]
                    return rows.at[i].set(new), errors.at[i].set(error)

                mine, found = lax.fori_loop(0, part, one_input, (take(rows, at, part), jnp.zeros((part, N))))
                rows = rows - passed_on(reach, at + part, found)
                put = lambda array, new: lax.dynamic_update_slice_in_dim(array, new, at, axis=0)
                return put(rows, mine), put(errors, found)

            rows, errors = lax.fori_loop(0, together // part, one_part, (rows, errors))
            return rows, errors, lax.dynamic_update_slice_in_dim(kept, chosen, start + first, axis=0)

        done = (take(w, start, block), jnp.zeros((block, N)), kept)
        rows, errors, kept = lax.fori_loop(0, block // together, one_group, done)
        w = w - passed_on(reach, start + block, errors)
        return lax.dynamic_update_slice_in_dim(w, rows, start, axis=0), kept

    made = lax.fori_loop(0, padded // block, one_block, (w, jnp.ones((padded, N), bool)))
    return tuple(jnp.zeros_like(array[:K]).at[inverse.order].set(array[:K]) for array in made)
