"""Matmuls with a weight of any format, accumulated in float32."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from efflm.ops.grid import grouped
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.lowrank import LowRank
from efflm.ops.norm import normalize
from efflm.ops.qarray import QArray, codes, dequantize, operands, rounded_rows, scales, zero_points
from efflm.ops.recompute import late

MATMUL = "matmul"


def transposed(x: jax.Array) -> jax.Array:
    """x [..., M, N] -> [..., N, M], as an array of its own and not as a view that a matmul then reads with strides.

    XLA's CPU compiler folds a plain transpose into the matmul that reads it, and a bfloat16 matmul with such a left
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
    return lax.dot_general(x, w, _last_axis_and(int(transpose), x), preferred_element_type=jnp.float32)


def _last_axis_and(axis: int, x: jax.Array) -> Any:
    """What lax.dot_general is told to multiply the last axis of x with an axis of the other operand."""
    return ((x.ndim - 1,), (axis,)), ((), ())


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [..., K], g [..., N] -> float32 [K, N]: x.T @ g, summed over the rows of all leading axes."""
    return matmul(transposed(x.reshape(-1, x.shape[-1])), g.reshape(-1, g.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _float_matmul(x: jax.Array, w: jax.Array, transpose: bool) -> jax.Array:
    return _float_matmul_forward(x, w, transpose)[0]


def _float_matmul_forward(x, w, transpose):
    along = _last_axis_and(int(transpose), x)
    return lax.dot_general(x, w.astype(x.dtype), along, preferred_element_type=jnp.float32), (x, w)


def _float_matmul_backward(transpose, residuals, g):
    # The transpose rule would multiply a float32 cotangent with a low-precision operand, which no backend does fast.
    x, w = residuals
    g = g.astype(x.dtype)
    dx = matmul(g, w.astype(x.dtype), not transpose)
    dw = weight_gradient(g, x) if transpose else weight_gradient(x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_float_matmul.defvjp(_float_matmul_forward, _float_matmul_backward)


def dot(x: Any, w: Any, residual: jax.Array | None = None) -> jax.Array:
    """x [..., K] @ w [K, N] -> float32 [..., N], plus a residual of that shape. x: an array or Normed.

    The dtype of x is the compute dtype; w is brought to it.
    """
    return dots(x, (w,), residual)[0]


def dots(x: Any, weights: Sequence[Any], residual: jax.Array | None = None) -> list[jax.Array]:
    """`dot` with each of several weights, which may be one kernel."""
    if any(isinstance(w, LowRank) for w in weights):
        return _low_rank(normalize(x), weights, residual)
    out = cpu.dots(x, weights, residual)
    if out is not None:
        return out
    x, outs = normalize(x), []
    for w in weights:
        out = cpu.dots(x, (w,), residual) if len(weights) > 1 else None  # some may still have a kernel
        if out is None:
            product = _product(x, w, transpose=False)
            out = [product if residual is None else residual + product]
        outs += out
    return outs


def _low_rank(x: jax.Array, weights: Sequence[Any], residual: jax.Array | None) -> list[jax.Array]:
    """(x @ a) @ b beside what the bases give, to which no gradient flows."""
    outs = list(_frozen_dots(x, tuple(w.base if isinstance(w, LowRank) else w for w in weights)))
    for i, w in enumerate(weights):
        if isinstance(w, LowRank):
            outs[i] = outs[i] + dot(dot(x, w.a).astype(x.dtype), w.b)
    return outs if residual is None else [residual + each for each in outs]


@jax.custom_vjp
def _frozen_dots(x: jax.Array, weights: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    return tuple(dots(x, weights))


def _frozen_forward(x, weights):
    # Of x only the dtype is kept, and of a compressed weight no floats.
    return _frozen_dots(x, tuple(_late(w, x) for w in weights)), (jnp.zeros((), x.dtype), weights)


def _frozen_backward(residuals, gradients):
    # Rounding of activations is passed over, as in ops.straight_through.
    like, weights = residuals
    parts = (
        matmul(g.astype(like.dtype), dequantize(_late(w, g)).astype(like.dtype), True)
        for g, w in zip(gradients, weights)
    )
    return functools.reduce(jnp.add, parts).astype(like.dtype), None


def _late(w: Any, x: jax.Array) -> Any:
    """A weight whose floats are not made before x is there: else XLA makes those of all layers at once (see `late`)."""
    return w.replace(values=late(w.values, x)) if isinstance(w, QArray) else w


_frozen_dots.defvjp(_frozen_forward, _frozen_backward)


def dot_transposed(x: Any, w: Any) -> jax.Array:
    """x [..., K] @ w.T for w [N, K] -> float32 [..., N]."""
    out = cpu.dots(x, (w,), transposed=True)
    return _product(normalize(x), w, transpose=True) if out is None else out[0]


def _product(x: jax.Array, w: Any, transpose: bool) -> jax.Array:
    """The portable form. The result is named MATMUL, for policies of rematerialization, which do not look into a custom
    derivative."""
    if isinstance(w, cpu.Dense):
        w = w.value
    elif isinstance(w, cpu.Panels):  # quantized along the outputs, which no kernel takes
        return matmul(x, cpu.unpacked(w).astype(x.dtype), transpose)
    if isinstance(w, QArray):
        return _quantized(x, w, transpose)
    out = _float_matmul(*operands(x, w), transpose)
    return out if transpose else checkpoint_name(out, MATMUL)


# --- quantized weights -----------------------------------------------------------------------------------------------


def _quantized(x: jax.Array, w: QArray, transpose: bool) -> jax.Array:
    """The portable form: integer matmuls where activations are integers, else matmuls in the dtype of x.

    One scale for each output is applied to the result; with groups, to the weight (floating-point activations), or to
    the int32 sums of each group.
    """
    if w.axis != (-1 if transpose else -2):  # quantized along the outputs: no scale can be taken out of the sum
        return matmul(x, dequantize(w).astype(x.dtype), transpose)
    if w.activations == "float":
        if w.group:
            return matmul(x, dequantize(w).astype(x.dtype), transpose)
        return _scaled(matmul(x, codes(w).astype(x.dtype), transpose), x, w)
    rounded, row_scale = rounded_rows(x, w.activation_scale)
    if w.group:
        return _grouped_int8_matmul(rounded, w) * row_scale
    total = lax.dot_general(rounded, codes(w), _last_axis_and(int(transpose), x), preferred_element_type=jnp.int32)
    return _scaled(total.astype(jnp.float32) * row_scale, rounded.astype(jnp.float32) * row_scale, w)


def _scaled(total: jax.Array, x: jax.Array, w: QArray) -> jax.Array:
    """(total - sum(x) * zeros) * scale: total [..., N] was summed over x [..., K] times codes."""
    per_output = lambda part: part.astype(jnp.float32).reshape((1,) * (total.ndim - 1) + (-1,))
    if w.zeros is not None:
        total = total - jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True) * per_output(zero_points(w))
    return total * per_output(scales(w))


def _grouped_int8_matmul(x: jax.Array, w: QArray) -> jax.Array:
    """int8 x [..., K] times w, each group summed in int32 and then scaled; float32 [..., N] in units of x."""
    to_gkn = (lambda part: part.T) if w.axis == -1 else (lambda part: part)
    codes_GgN = grouped(to_gkn(codes(w)), 0, w.group)
    x_MGg = grouped(x.reshape(-1, x.shape[-1]), -1, w.group)
    dimensions = (((2,), (1,)), ((1,), (0,)))
    total_GMN = lax.dot_general(x_MGg, codes_GgN, dimensions, preferred_element_type=jnp.int32)
    if w.zeros is not None:
        sums_GM1 = jnp.sum(x_MGg.astype(jnp.int32), axis=-1).T[:, :, None]
        total_GMN = total_GMN - sums_GM1 * to_gkn(zero_points(w)).astype(jnp.int32)[:, None]
    scaled_GMN = total_GMN.astype(jnp.float32) * to_gkn(scales(w))[:, None]
    return jnp.sum(scaled_GMN, axis=0).reshape(*x.shape[:-1], -1)
