"""The weights of attention as an array, which `attention` never holds: for losses that compare them."""

import math

import jax
import jax.numpy as jnp

from efflm.ops.attention_blocks import MASKED
from efflm.ops.soft_cap import soft_cap


def attention_probabilities(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    slots_T: jax.Array,
    key_slots_S: jax.Array,
    segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    window: int = 0,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) over the keys that each query may see -> float32 [B, N, T, S], 0 for the others.

    A query in slot t sees the keys in the slots up to t, of these the last `window` (0: all), and of these the ones in
    its own segment. Query head n reads key-value head n // (N / K). cap: as in ops.attention.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores = soft_cap(scores, cap)
    behind_TS = slots_T[:, None] - key_slots_S[None]
    seen_1TS = ((behind_TS >= 0) & (behind_TS < (window or S + T)))[None]
    if segments_BT is not None:
        seen_1TS = seen_1TS & (segments_BT[:, :, None] == key_segments_BS[:, None])
    seen = seen_1TS[:, None, None]
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1), 0.0).reshape(B, N, T, S)
