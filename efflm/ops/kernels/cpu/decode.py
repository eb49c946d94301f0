"""Attention of a few new tokens a sequence over its KV cache, which the kernel updates in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from efflm.ops.kernels.cpu import build

DTYPES = (jnp.float32, jnp.bfloat16)
FEW_TOKENS = 8  # up to which it is faster to read the cache once for each than to form a matrix of all scores


def takes(queries: int, dtype: DTypeLike, cache: DTypeLike) -> bool:
    """Whether the kernel computes attention of so many queries a sequence in `dtype`, over a cache of another."""
    return queries <= FEW_TOKENS and jnp.dtype(dtype) in DTYPES and jnp.dtype(cache) in DTYPES


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    positions_BT: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    *,
    dtype: Any,
    window: int,
    form: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ops.cached_attention."""
    cos, sin = rotary if rotary is not None else (jnp.zeros((*positions_BT.shape, 0), jnp.float32),) * 2
    shapes = [jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys_BSKH, values_BSKH)]
    call = jax.ffi.ffi_call(
        build.target("efflm_decode", form), shapes, input_output_aliases={6: 1, 7: 2}, vmap_method="sequential"
    )
    new = [x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH)]
    out = call(
        *new, positions_BT.astype(jnp.int32), cos, sin, keys_BSKH, values_BSKH,
        window=np.int64(window), to_bfloat16=jnp.dtype(dtype) == jnp.bfloat16,
    )  # fmt: skip
    return tuple(out)
