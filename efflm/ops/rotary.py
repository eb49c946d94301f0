"""Rotary position embedding (Su 2021, arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + R) of every head by the angles of their position, in float32; the shape stays.

    The dimensions of a head beyond the first 2 R are not rotated.
    """
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    x_BTNH = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x_BTNH[..., : 2 * half], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(parts if x_BTNH.shape[-1] == 2 * half else [*parts, x_BTNH[..., 2 * half :]], axis=-1)
