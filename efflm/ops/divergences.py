"""Divergences of a teacher's distribution p and a student's q over the vocabulary, with their gradients.

Each is divergence(log_p_MV, log_q_MV, mix) -> (values [M], in nats; their gradients [M, V] to the student's logits),
where log_q = log_softmax(logits) and both are float32. m is mix * p + (1 - mix) * q, with mix in (0, 1).

The gradient to the logits is q * (s - sum(q * s)) for s = d value / d q, the derivative entry by entry. Terms of s that
are the same in every entry cancel. That gives
    forward         KL(p || q)                             s = -p / q                 gradient  q - p
    reverse         KL(q || p)                             s = log(q / p) + 1         q * (log(q / p) - KL(q || p))
    jensen_shannon  mix * KL(p || m) + (1 - mix) * KL(q || m)
                    s = (1 - mix) * log(q / m)             (1 - mix) * q * (log(q / m) - KL(q || m))
    skew            KL(p || m)
                    s = -(1 - mix) * p / m                 (1 - mix) * q * (sum(q * p / m) - p / m)
Jensen-Shannon's s has no other term because those of the mixture's own change add up to (1 - mix) * (1 - m / m) = 0.
None of them divides by q or p, and p / m is 1 / mix at most: gradients are finite for any logits.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["forward", "reverse", "jensen_shannon", "skew"]
Values = tuple[jax.Array, jax.Array]


def forward(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> Values:
    """KL(p || q) (Hinton 2015, arXiv 1503.02531, section 2). The student covers all that the teacher writes."""
    del mix
    p_MV = jnp.exp(log_p_MV)
    return jnp.sum(p_MV * (log_p_MV - log_q_MV), axis=-1), jnp.exp(log_q_MV) - p_MV


def reverse(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> Values:
    """KL(q || p) of every token (MiniLLM, Gu 2023, arXiv 2306.08543, equation 1, on given text in place of samples of
    the student). The student keeps to what the teacher finds likely."""
    del mix
    return _relative(jnp.exp(log_q_MV), log_q_MV - log_p_MV)


def jensen_shannon(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> Values:
    """mix * KL(p || m) + (1 - mix) * KL(q || m) (GKD, Agarwal 2023, arXiv 2306.13649, equation 1; mix is its beta).

    At most the entropy of (mix, 1 - mix). Divided by mix it tends to KL(p || q) as mix goes to 0.
    """
    p_MV, q_MV, m_MV = _mixture(log_p_MV, log_q_MV, mix)
    log_m_MV = jnp.log(m_MV)
    of_student_M, gradient_MV = _relative(q_MV, log_q_MV - log_m_MV)
    of_teacher_M = jnp.sum(p_MV * (log_p_MV - log_m_MV), axis=-1)
    return mix * of_teacher_M + (1 - mix) * of_student_M, (1 - mix) * gradient_MV


def skew(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> Values:
    """KL(p || m) (DistiLLM, Ko 2024, arXiv 2402.03898, skew KL; mix is its alpha, 0.1 there). At most -log(mix)."""
    p_MV, q_MV, m_MV = _mixture(log_p_MV, log_q_MV, mix)
    share_MV = p_MV / m_MV
    expected_M = jnp.sum(q_MV * share_MV, axis=-1, keepdims=True)
    values_M = jnp.sum(p_MV * (log_p_MV - jnp.log(m_MV)), axis=-1)
    return values_M, (1 - mix) * q_MV * (expected_M - share_MV)


def _relative(q_MV: jax.Array, log_ratio_MV: jax.Array) -> Values:
    """KL of q to what it is log_ratio away from, and q * (log_ratio - KL)."""
    values_M = jnp.sum(q_MV * log_ratio_MV, axis=-1)
    return values_M, q_MV * (log_ratio_MV - values_M[:, None])


def _mixture(log_p_MV: jax.Array, log_q_MV: jax.Array, mix: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p, q and m. Where both are 0 in float32, m is the least normal number, whose logarithm is finite."""
    p_MV, q_MV = jnp.exp(log_p_MV), jnp.exp(log_q_MV)
    return p_MV, q_MV, jnp.maximum(mix * p_MV + (1 - mix) * q_MV, jnp.finfo(jnp.float32).tiny)


DIVERGENCES: Mapping[Divergence, Callable[[jax.Array, jax.Array, float], Values]] = MappingProxyType(
    {"forward": forward, "reverse": reverse, "jensen_shannon": jensen_shannon, "skew": skew}
)
