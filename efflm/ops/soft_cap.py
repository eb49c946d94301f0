"""Soft caps of scores and logits (Gemma 2, arXiv 2408.00118, section 2)."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap), float32; x as it is where the cap is 0."""
    return cap * jnp.tanh(x.astype(jnp.float32) / cap) if cap else x


def slope(capped: jax.Array, cap: float) -> jax.Array | float:
    """The derivative of `soft_cap`, by its result."""
    return 1 - jnp.square(capped / cap) if cap else 1.0
