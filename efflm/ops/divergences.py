"""Divergences of a teacher's distribution p and a student's q over the vocabulary.

Each is divergence(log_p_MV, log_q_MV, mix) -> float32 [M], in nats. m is the mixture mix * p + (1 - mix) * q, with mix
in (0, 1). None divides by p or q, and m is kept from 0, so that values and gradients are finite for any finite logits.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["forward", "reverse", "jensen_shannon", "skew"]


def forward(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> jax.Array:
    """KL(p || q) (Hinton 2015, arXiv 1503.02531, section 2): the student covers all that the teacher finds likely."""
    del mix
    return _kl(log_p_MV, log_q_MV)


def reverse(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> jax.Array:
    """KL(q || p) (MiniLLM, Gu 2023, arXiv 2306.08543), of every next token of given text, where the paper samples from
    the student: the student keeps to what the teacher finds likely."""
    del mix
    return _kl(log_q_MV, log_p_MV)


def jensen_shannon(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> jax.Array:
    """mix * KL(p || m) + (1 - mix) * KL(q || m) (GKD, Agarwal 2023, arXiv 2306.13649, equation 1; mix is its beta).

    At most the entropy of (mix, 1 - mix). Divided by mix it tends to KL(p || q) as mix goes to 0.
    """
    log_m_MV = _log_mixture(log_p_MV, log_q_MV, mix)
    return mix * _kl(log_p_MV, log_m_MV) + (1 - mix) * _kl(log_q_MV, log_m_MV)


def skew(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> jax.Array:
    """KL(p || m) (skew KL of DistiLLM, Ko 2024, arXiv 2402.03898; mix is its alpha, 0.1 there). At most -log(mix)."""
    return _kl(log_p_MV, _log_mixture(log_p_MV, log_q_MV, mix))


def _kl(log_a_MV: jax.Array, log_b_MV: jax.Array) -> jax.Array:
    # b - a adds up to zero, but for rounding errors of the logarithms, which it takes away: no term is negative.
    a_MV, b_MV = jnp.exp(log_a_MV), jnp.exp(log_b_MV)
    return jnp.sum(a_MV * (log_a_MV - log_b_MV) + (b_MV - a_MV), axis=-1)


def _log_mixture(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> jax.Array:
    """log m; that of the least normal number where p and q are both 0 in float32."""
    m_MV = mix * jnp.exp(log_p_MV) + (1 - mix) * jnp.exp(log_q_MV)
    return jnp.log(jnp.maximum(m_MV, jnp.finfo(jnp.float32).tiny))


DIVERGENCES: Mapping[Divergence, Callable[[jax.Array, jax.Array, float], jax.Array]] = MappingProxyType(
    {"forward": forward, "reverse": reverse, "jensen_shannon": jensen_shannon, "skew": skew}
)
