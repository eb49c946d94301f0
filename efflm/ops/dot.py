"""Products with a weight of any format, accumulated in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.qarray import QArray, round_to_int8


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _matmul_forward(x, w):
    return _matmul(x, w), (x, w)


def _matmul_backward(residuals, g):
    # The transpose rule would multiply a float32 cotangent with a low-precision operand, which no backend does fast.
    x, w = residuals
    g = g.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dw = lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _int8_matmul(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    """x rounded to int8 row by row, times int8 values contracted over `axis`, accumulated in int32."""
    rounded, row_scale = round_to_int8(x, axis=-1)
    total = lax.dot_general(rounded, values, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * row_scale


def dot(x: jax.Array, w: Any) -> jax.Array:
    """x [..., K] @ w [K, N] -> float32 [..., N]. The dtype of x is the compute dtype; w is brought to it."""
    if not isinstance(w, QArray):
        return _matmul(x, w.astype(x.dtype))
    return _scaled(x, w, w.values, w.scale)


def dot_transposed(x: jax.Array, w: Any) -> jax.Array:
    """x [..., K] @ w.T for w [N, K] -> float32 [..., N]."""
    if not isinstance(w, QArray):
        return _matmul(x, w.astype(x.dtype).T)
    return _scaled(x, w, w.values.T, w.scale.T)


def _scaled(x: jax.Array, w: QArray, values: jax.Array, scale: jax.Array) -> jax.Array:
    scale_N = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    if w.activations == "int8":
        return _int8_matmul(x, values, 0) * scale_N
    return _matmul(x, values.astype(x.dtype)) * scale_N
