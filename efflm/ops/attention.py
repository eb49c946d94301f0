"""Causal attention with grouped key-value heads, packed documents and sliding windows.

Its portable form is ops.attention_blocks. Where a platform has a kernel that takes the call (`kernel_for`), the program
holds both and the platform that it is compiled for chooses, whatever is attached to the machine that traces it.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax

from efflm.ops import attention_blocks
from efflm.ops.kernels import Attention, gpu, tpu
from efflm.ops.kernels.cpu import attention as cpu

KERNELS = {"tpu": tpu, "cuda": gpu, "cpu": cpu}  # by JAX's name of the platform that is compiled for


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    slots_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    window: int = 0,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys that each query may see -> float32 [B, T, N, H].

    A query sees the keys up to its own slot, slots_BT[b, t] of the S (default: the queries are the last T of the S, in
    order), of these the last `window` (0: all), and of these the ones in its own segment, where segments are given
    (key_segments_BS: the keys', where keys are not the queries' own). The result is 0 where it sees no key.
    Query head n reads key-value head n // (N / K). cap: of the scores, a soft one (0: none). Raises ValueError for
    shapes that do not fit.
    """
    require_heads(q_BTNH, k_BSKH, v_BSKH)
    _require_places(q_BTNH, k_BSKH, slots_BT, segments_BT, key_segments_BS)
    (_, T, _, H), S, in_order = q_BTNH.shape, k_BSKH.shape[1], slots_BT is None
    call = Attention(T, S, H, q_BTNH.dtype, window, in_order, key_segments_BS is None, cap)
    where = {"window": window} if in_order else {"window": window, "slots_BT": slots_BT}
    kernels = {name: functools.partial(kernel, **where) for name in KERNELS if (kernel := kernel_for(name, call))}
    if key_segments_BS is None:
        key_segments_BS = segments_BT
    portable = functools.partial(attention_blocks.attention, slots_BT=slots_BT, window=window, cap=cap)
    if not kernels:
        return portable(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS)
    return lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, default=portable, **kernels)


def require_heads(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> None:
    """Raise ValueError unless queries, keys and values fit: kernels would read or leave out other memory."""
    (B, _, N, H), (_, _, K, _) = q_BTNH.shape, k_BSKH.shape
    if k_BSKH.shape[::3] != (B, H) or v_BSKH.shape != k_BSKH.shape:
        raise ValueError(
            f"queries of shape {q_BTNH.shape}, keys of {k_BSKH.shape} and values of {v_BSKH.shape} do not fit: batch "
            "and head size must be the same, and all of keys and values"
        )
    if K == 0 or N % K:
        raise ValueError(f"{N} query heads cannot be shared among {K} key-value heads: these must divide them")


def _require_places(q_BTNH, k_BSKH, slots_BT, segments_BT, key_segments_BS) -> None:
    (B, T, *_), S = q_BTNH.shape, k_BSKH.shape[1]
    if S == 0 or (slots_BT is None and T > S):
        raise ValueError(f"there are {T} queries and {S} keys, and without slots the queries are the last of the keys")
    if segments_BT is None and key_segments_BS is not None:
        raise ValueError("segments of the keys are given, but none of the queries")
    of_keys = segments_BT if key_segments_BS is None else key_segments_BS
    for name, x, size in (("slots", slots_BT, T), ("segments", segments_BT, T), ("segments of the keys", of_keys, S)):
        if x is not None and x.shape not in ((B, size), (1, size)):
            raise ValueError(f"{name} have shape {x.shape}, but must have {(B, size)}")


def kernel_for(platform: str, call: Attention) -> Callable[..., jax.Array] | None:
    """The kernel that `attention` runs on a platform ("tpu", "cuda", "cpu"), or None: the portable form."""
    kernels = KERNELS.get(platform)
    return kernels.attention if kernels and not call.cap and kernels.takes(call) else None
