"""Rotary position embedding (Su 2021, arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

import math

import jax
import jax.numpy as jnp

from efflm.config import ModelConfig, RopeScaling


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotate the pairs (i, i + R/2) of every head by position * base^(-2i/R), in float32; the shape stays.

    R is the config's share of H; the other dimensions of a head are not rotated.
    """
    size = x_BTNH.shape[-1]
    rotated = int(size * config.rotary_fraction)
    half = rotated // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling:
        frequencies = scaled(frequencies, config.rope_scaling)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x_BTNH = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x_BTNH[..., :rotated], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(parts if rotated == size else [*parts, x_BTNH[..., rotated:]], axis=-1)


def scaled(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1's frequencies for sequences `factor` times as long as the original, as in the code released with it.

    A frequency with at least high_freq_factor rotations in the original length is kept; one with at most
    low_freq_factor rotations is divided by `factor`; in between, the two are interpolated linearly in the rotations.
    """
    rotations = scaling.original_max_length * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((rotations - scaling.low_freq_factor) / span, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
