"""Attention with a KV cache: new keys and values are written into it, and the queries read it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from efflm.ops.attention import attention
from efflm.ops.kernels.cpu import build
from efflm.ops.kernels.cpu import decode as cpu
from efflm.ops.rotary import rotate

FEW = 16  # sequences up to which each row of the cache is updated in place by an instruction of its own


def cached_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    positions_BT: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    *,
    dtype: Any,
    window: int = 0,
    attend: Callable[..., jax.Array] = attention,
    whole: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(float32 [B, T, N, H], keys, values): attention in `dtype` after T new positions went into the cache.

    positions_BT: consecutive; slot s of the cache [B, S, K, H] holds position s. rotary: cosines and sines [B, T, R],
    by which queries and new keys are rotated. whole: whether each array lies on one device; if not, `attend` is
    attention on a mesh.
    """
    portable = functools.partial(_portable, dtype=dtype, window=window, attend=attend, whole=whole)
    arguments = (q_BTNH, k_BTKH, v_BTKH, keys_BSKH, values_BSKH, positions_BT, rotary)
    form = build.form() if whole and cpu.takes(q_BTNH.shape[1], dtype, keys_BSKH.dtype) else ""
    if not form:
        return portable(*arguments)
    native = functools.partial(cpu.attention, dtype=dtype, window=window, form=form)
    return lax.platform_dependent(*arguments, cpu=native, default=portable)


def _portable(q_BTNH, k_BTKH, v_BTKH, keys_BSKH, values_BSKH, positions_BT, rotary, *, dtype, window, attend, whole):
    if rotary is not None:
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
    start_B = positions_BT[:, 0]
    keys_BSKH = _write(keys_BSKH, k_BTKH.astype(dtype), start_B, whole)
    values_BSKH = _write(values_BSKH, v_BTKH.astype(dtype), start_B, whole)
    read = lambda x: x.astype(dtype)
    arrays = (read(q_BTNH), read(keys_BSKH), read(values_BSKH))
    out_BTNH = attend(*arrays, segments_BT=None, slots_BT=positions_BT, window=window)
    return out_BTNH, keys_BSKH, values_BSKH


def _write(buffer_BSKH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array, whole: bool) -> jax.Array:
    new_BTKH = new_BTKH.astype(buffer_BSKH.dtype)
    if whole and len(buffer_BSKH) <= FEW:  # XLA makes a scatter of an update that is mapped over sequences
        for b in range(len(buffer_BSKH)):
            buffer_BSKH = lax.dynamic_update_slice(buffer_BSKH, new_BTKH[b : b + 1], (b, start_B[b], 0, 0))
        return buffer_BSKH
    write_row = lambda row, new, start: lax.dynamic_update_slice(row, new, (start, 0, 0))
    return jax.vmap(write_row)(buffer_BSKH, new_BTKH, start_B)
