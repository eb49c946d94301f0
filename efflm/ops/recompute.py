"""Recomputation in the backward pass, and what keeps a compiler from doing it in the forward pass.

XLA's CPU compiler drops optimization barriers, merges equal computations and runs each as soon as its inputs are there:
what is to be recomputed would be computed once, in the forward pass, and stored. What depends on a value of the
incoming gradient is not: it has to wait for that gradient.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax


def late(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x, but not before the gradient is there."""
    tie = lambda x, gradient: x + (0 * gradient[(0,) * gradient.ndim]).astype(x.dtype)
    barrier = lambda x, gradient: lax.optimization_barrier((x, gradient))[0]
    return lax.platform_dependent(x, gradient, cpu=tie, default=barrier)


def recomputed(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """fn, of arrays that may be differentiated, whose backward pass stores its arguments and nothing else.

    For elementwise work and small reductions, which cost less to do twice than their values to store and load.
    """

    def backward(args, gradient):
        first, *rest = args
        return jax.vjp(fn, late(first, gradient), *rest)[1](gradient)

    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), args), backward)
    return functools.wraps(fn)(wrapped)
