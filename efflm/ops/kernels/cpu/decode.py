"""Attention of one new token a sequence over its KV cache, which the kernel updates in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from efflm.ops.kernels.cpu import build

DTYPES = (jnp.float32, jnp.bfloat16)


def takes(queries: int, dtype: DTypeLike, cache: DTypeLike) -> bool:
    """Whether the kernel computes attention of so many queries a sequence in `dtype`, over a cache of another."""
    return queries == 1 and jnp.dtype(dtype) in DTYPES and jnp.dtype(cache) in DTYPES


def attention(
    q_B1NH: jax.Array,
    k_B1KH: jax.Array,
    v_B1KH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    positions_B1: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    *,
    dtype: Any,
    window: int,
    form: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ops.cached_attention, for T = 1."""
    B = len(q_B1NH)
    cos, sin = rotary if rotary is not None else (jnp.zeros((B, 1, 0), jnp.float32),) * 2
    shapes = [jax.ShapeDtypeStruct(q_B1NH.shape, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys_BSKH, values_BSKH)]
    call = jax.ffi.ffi_call(
        build.target("efflm_decode", form), shapes, input_output_aliases={6: 1, 7: 2}, vmap_method="sequential"
    )
    new = [x.astype(jnp.float32) for x in (q_B1NH, k_B1KH, v_B1KH)]
    out = call(
        *new, positions_B1[:, 0].astype(jnp.int32), cos[:, 0], sin[:, 0], keys_BSKH, values_BSKH,
        window=np.int64(window), to_bfloat16=jnp.dtype(dtype) == jnp.bfloat16,
    )  # fmt: skip
    return tuple(out)
