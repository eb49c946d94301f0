"""Attention on CPUs: a native kernel, forward and backward (see src/attention.h).

XLA multiplies batches of small matrices on one core, at less than half the speed of large ones. The kernel reads
queries, keys and values as they lie, with all cores, skips what the mask hides, and holds no scores in memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efflm.ops.kernels import Attention
from efflm.ops.kernels.cpu import build

TASKS, CHUNK = 16, 96  # the backward pass cuts keys into chunks, at least so long, until there are so many tasks


def takes(call: Attention) -> bool:
    """Whether the kernel can compute this attention.

    Not where an accelerator is attached: the kernel is built on first use, and programs there are not for the CPU.
    """
    dtypes = (jnp.bfloat16, jnp.float32)
    return (
        call.queries > 1 and jnp.dtype(call.dtype) in dtypes and jax.default_backend() == "cpu" and build.form() != ""
    )


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    window: int,
    slots_BT: jax.Array | None = None,
) -> jax.Array:
    """ops.attention -> float32 [B, T, N, H]; 0 for queries that see no key."""
    B, dtype = q_BTNH.shape[0], q_BTNH.dtype
    whole = lambda x: jnp.zeros((B, 0), jnp.int32) if x is None else jnp.broadcast_to(x, (B, x.shape[1]))
    places = tuple(whole(x).astype(jnp.int32) for x in (slots_BT, segments_BT, key_segments_BS))
    return _attend(q_BTNH, k_BSKH.astype(dtype), v_BSKH.astype(dtype), places, window, build.form())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, places, window: int, form: str) -> jax.Array:
    return _attend_forward(q, k, v, places, window, form)[0]


def _attend_forward(q, k, v, places, window: int, form: str):
    B, T, N, _ = q.shape
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    out, normalizers = _call("efflm_attention", form, results, (q, k, v, *places), window=np.int64(window))
    return out, (q, k, v, places, out, normalizers)


def _attend_backward(window: int, form: str, residuals, g):
    q, k, v, places, out, normalizers = residuals
    B, S, K, _ = k.shape
    chunks = max(1, min(-(-TASKS // (B * K)), S // CHUNK))
    dtypes = (q.dtype if chunks == 1 else jnp.float32, k.dtype, v.dtype)  # chunks add to the gradient of the queries
    results = tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
    inputs = (q, k, v, *places, out, normalizers, g)
    options = {"window": np.int64(window), "chunks": np.int64(chunks)}
    dq, dk, dv = _call("efflm_attention_backward", form, results, inputs, **options)
    return dq.astype(q.dtype), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(name: str, form: str, results: tuple, inputs: tuple, **options: np.int64) -> tuple:
    return jax.ffi.ffi_call(build.target(name, form), results, vmap_method="broadcast_all")(*inputs, **options)
