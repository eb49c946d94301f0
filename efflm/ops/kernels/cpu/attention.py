"""Attention of many queries on CPUs, forward and backward (FlashAttention, Dao 2022, arXiv 2205.14135).

XLA's CPU compiler multiplies batches of small matrices on one core at less than half the speed of large ones; these
kernels use all cores and keep blocks of scores in the cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from efflm.ops.kernels.cpu import build

DTYPES = (jnp.float32, jnp.bfloat16)


def takes(queries: int, keys: int, head_dim: int, dtype: DTypeLike, window: int, own_segments: bool) -> bool:
    """Whether the kernel can compute this attention: any shapes, windows and segments, in float32 and bfloat16."""
    del window, own_segments
    return jnp.dtype(dtype) in DTYPES and min(queries, keys, head_dim) > 0 and build.form() != ""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    window: int,
    slots_BT: jax.Array | None = None,
) -> jax.Array:
    """ops.attention -> float32 [B, T, N, H]."""
    none = jnp.zeros(0, jnp.int32)

    def integers(x, rows, length):
        return none if x is None else jnp.broadcast_to(x, (rows, length)).astype(jnp.int32)

    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    where = (integers(slots_BT, B, T), integers(segments_BT, B, T), integers(key_segments_BS, B, S))
    return _attend(q_BTNH, k_BSKH, v_BSKH, *where, window, build.form())


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, slots, segments, key_segments, window: int, form: str) -> jax.Array:
    return _forward(q, k, v, slots, segments, key_segments, window, form)[0]


def _forward(q, k, v, slots, segments, key_segments, window, form):
    B, T, N, _ = q.shape
    shapes = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    call = jax.ffi.ffi_call(build.target("efflm_attention", form), shapes, vmap_method="sequential")
    out, normalizer = call(q, k, v, slots, segments, key_segments, window=np.int64(window))
    return out, (q, k, v, slots, segments, key_segments, out, normalizer)


def _backward(window, form, residuals, gradient):
    q, k, v = residuals[:3]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    call = jax.ffi.ffi_call(build.target("efflm_attention_backward", form), shapes, vmap_method="sequential")
    return (*call(*residuals, gradient, window=np.int64(window)), None, None, None)


_attend.defvjp(_forward, _backward)
