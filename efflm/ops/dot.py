"""Products with a weight of any format, accumulated in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from efflm.ops.qarray import QArray, round_to_int8

MATMUL = "matmul"


def transposed(x: jax.Array) -> jax.Array:
    """x [..., M, N] -> [..., N, M], as an array of its own and not as a view that a product then reads across.

    XLA's CPU compiler folds a plain transpose into the product that reads it, and a bfloat16 product with such a left
    operand falls back to float32 at half the speed or less. A reshape in between is not folded. In float32, where
    writing the operand costs more than it gains, and elsewhere, the folded form is the fast one.
    """
    M, N = x.shape[-2:]
    if x.dtype == jnp.float32 or (N % 16 and M % 16):
        return x.swapaxes(-1, -2)
    lead = x.ndim - 2
    before, after = ((M, N // 16, 16), (1, 2, 0)) if N % 16 == 0 else ((M // 16, 16, N), (2, 0, 1))

    def through_a_reshape(x):
        split = x.reshape(*x.shape[:lead], *before)
        return split.transpose(*range(lead), *(lead + axis for axis in after)).reshape(*x.shape[:lead], N, M)

    return lax.platform_dependent(x, cpu=through_a_reshape, default=lambda x: x.swapaxes(-1, -2))


def matmul(x: jax.Array, w: jax.Array, transpose: bool = False) -> jax.Array:
    """x [..., K] @ w [K, N], or with `transpose` @ w.T for w [N, K], in their own dtype -> float32 [..., N]."""
    dimensions = (((x.ndim - 1,), (int(transpose),)), ((), ()))
    return lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [..., K], g [..., N] -> float32 [K, N]: x.T @ g, summed over the rows of all leading axes."""
    return matmul(transposed(x.reshape(-1, x.shape[-1])), g.reshape(-1, g.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _float_matmul(x: jax.Array, w: jax.Array, transpose: bool) -> jax.Array:
    return matmul(x, w.astype(x.dtype), transpose)


def _float_matmul_forward(x, w, transpose):
    return _float_matmul(x, w, transpose), (x, w)


def _float_matmul_backward(transpose, residuals, g):
    # The transpose rule would multiply a float32 cotangent with a low-precision operand, which no backend does fast.
    x, w = residuals
    g = g.astype(x.dtype)
    dx = matmul(g, w.astype(x.dtype), not transpose)
    dw = weight_gradient(g, x) if transpose else weight_gradient(x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_float_matmul.defvjp(_float_matmul_forward, _float_matmul_backward)


def _int8_matmul(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    """x rounded to int8 row by row, times int8 values contracted over `axis`, accumulated in int32."""
    rounded, row_scale = round_to_int8(x, axis=-1)
    total = lax.dot_general(rounded, values, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * row_scale


def dot(x: jax.Array, w: Any) -> jax.Array:
    """x [..., K] @ w [K, N] -> float32 [..., N]. The dtype of x is the compute dtype; w is brought to it.

    The result is named MATMUL, for policies of rematerialization, which do not look into a custom derivative.
    """
    if not isinstance(w, QArray):
        return checkpoint_name(_float_matmul(x, w, False), MATMUL)
    return _scaled(x, w, w.values, w.scale)


def dot_transposed(x: jax.Array, w: Any) -> jax.Array:
    """x [..., K] @ w.T for w [N, K] -> float32 [..., N]."""
    if not isinstance(w, QArray):
        return _float_matmul(x, w, True)
    return _scaled(x, w, w.values.T, w.scale.T)


def _scaled(x: jax.Array, w: QArray, values: jax.Array, scale: jax.Array) -> jax.Array:
    scale_N = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    if w.activations == "int8":
        return _int8_matmul(x, values, 0) * scale_N
    return matmul(x, values.astype(x.dtype)) * scale_N
