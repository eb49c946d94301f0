"""Attention with a KV cache: new keys and values are written into it, and the queries read it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.attention import attention, require_heads
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
    cap: float = 0.0,
    attend: Callable[..., jax.Array] = attention,
    whole: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(float32 [B, T, N, H], keys, values): attention in `dtype` after T new positions went into the cache.

    positions_BT: consecutive; slot s of the cache [B, S, K, H] holds position s. Where they reach beyond the cache, all
    of a sequence are moved back into it, as lax.dynamic_update_slice does. rotary: cosines and sines [B, T, R], by
    which queries and new keys are rotated. window, cap: as in ops.attention. whole: whether each array lies on one
    device; if not, `attend` is attention on a mesh. Raises ValueError for shapes that do not fit.
    """
    require_heads(q_BTNH, k_BTKH, v_BTKH)
    (B, T, _, H), S, angles = q_BTNH.shape, keys_BSKH.shape[1], () if rotary is None else rotary
    if keys_BSKH.shape != (B, S, *k_BTKH.shape[2:]) or values_BSKH.shape != keys_BSKH.shape:
        raise ValueError(f"keys of shape {k_BTKH.shape} do not fit caches of {keys_BSKH.shape}, {values_BSKH.shape}")
    if T > S:
        raise ValueError(f"{T} new positions do not fit a cache of {S}: make it longer")
    if positions_BT.shape != (B, T) or any(x.shape != (B, T, x.shape[-1]) or 2 * x.shape[-1] > H for x in angles):
        shapes = [positions_BT.shape, *(x.shape for x in angles)]
        raise ValueError(f"positions and rotations of shapes {shapes} do not fit queries of {q_BTNH.shape}")
    portable = functools.partial(_portable, dtype=dtype, window=window, cap=cap, attend=attend, whole=whole)
    arguments = (q_BTNH, k_BTKH, v_BTKH, keys_BSKH, values_BSKH, positions_BT, rotary)
    form = build.form() if whole and not cap and cpu.takes(q_BTNH.shape[1], dtype, keys_BSKH.dtype) else ""
    if not form:
        return portable(*arguments)
    native = functools.partial(cpu.attention, dtype=dtype, window=window, form=form)
    return lax.platform_dependent(*arguments, cpu=native, default=portable)


def _portable(
    q_BTNH, k_BTKH, v_BTKH, keys_BSKH, values_BSKH, positions_BT, rotary, *, dtype, window, cap, attend, whole
):
    if rotary is not None:
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
    T, S = positions_BT.shape[1], keys_BSKH.shape[1]
    start_B = jnp.clip(positions_BT[:, 0], 0, S - T)
    positions_BT = positions_BT + (start_B - positions_BT[:, 0])[:, None]
    keys_BSKH = _write(keys_BSKH, k_BTKH.astype(dtype), start_B, whole)
    values_BSKH = _write(values_BSKH, v_BTKH.astype(dtype), start_B, whole)
    read = lambda x: x.astype(dtype)
    arrays = (read(q_BTNH), read(keys_BSKH), read(values_BSKH))
    out_BTNH = attend(*arrays, segments_BT=None, slots_BT=positions_BT, window=window, cap=cap)
    return out_BTNH, keys_BSKH, values_BSKH


def _write(buffer_BSKH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array, whole: bool) -> jax.Array:
    new_BTKH = new_BTKH.astype(buffer_BSKH.dtype)
    if whole and len(buffer_BSKH) <= FEW:  # XLA makes a scatter of an update that is mapped over sequences
        for b in range(len(buffer_BSKH)):
            buffer_BSKH = lax.dynamic_update_slice(buffer_BSKH, new_BTKH[b : b + 1], (b, start_B[b], 0, 0))
        return buffer_BSKH
    write_row = lambda row, new, start: lax.dynamic_update_slice(row, new, (start, 0, 0))
    return jax.vmap(write_row)(buffer_BSKH, new_BTKH, start_B)
