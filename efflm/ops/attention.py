"""Causal attention with grouped key-value heads."""

import jax
import jax.numpy as jnp


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the allowed positions -> float32 [B, T, N, H].

    mask_BTS (its B and T may be 1) is True where a query may look; every query needs at least one such key. Query
    head n reads key-value head n // (N / K). Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    group = N // K
    # Heads to the front, a group's queries side by side: one plain batched product on any backend.
    q = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 3, 1, 4).reshape(B, K, group * T, H)
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = scores.reshape(B, K, group, T, S)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, group * T, S)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, K, group, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
