"""The angles of rotary position embedding (Su 2021, arXiv 2104.09864)."""

import math

import jax
import jax.numpy as jnp

from efflm.config import ModelConfig, RopeScaling


def tables(positions_BT: jax.Array, size: int, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, R/2] of the angles position * base^(-2i/R), float32, which ops.rotate reads.

    R is the config's share of `size`, the dimensions of a head.
    """
    half = int(size * config.rotary_fraction) // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling:
        frequencies = scaled(frequencies, config.rope_scaling)
    angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def scaled(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1's frequencies for sequences `factor` times as long as the original, as in the code released with it.

    A frequency with at least high_freq_factor rotations in the original length is kept; one with at most
    low_freq_factor rotations is divided by `factor`; in between, the two are interpolated linearly in the rotations.
    """
    rotations = scaling.original_max_length * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((rotations - scaling.low_freq_factor) / span, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
