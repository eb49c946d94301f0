"""The angles of rotary position embedding (Su 2021, arXiv 2104.09864)."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from efflm.config.model import ModelConfig, Scaling, YarnScaling
from efflm.parallel.sharding import is_whole

LOOPS, MANY = 2, 64  # a loop of one turn is no loop to the compiler; of fewer positions it costs more than it spares


def tables(positions_BT: jax.Array, size: int, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, R/2] of the angles position * base^(-2i/R), float32, which ops.rotate reads.

    R is the config's share of `size`, the dimensions of a head.
    """
    scaling = config.rope_scaling
    angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies(size, config)[None, None, :]
    count = angles.shape[0] * angles.shape[1]
    if count % LOOPS or count < MANY or not is_whole():
        cos_sin = _both(angles)
    else:
        cos_sin = lax.platform_dependent(angles, cpu=_once, default=_both)
    if not isinstance(scaling, YarnScaling):
        return cos_sin
    return tuple(part * scaling.attention_factor for part in cos_sin)


def frequencies(size: int, config: ModelConfig) -> jax.Array:
    """base^(-2i/R), scaled as the config says, float32 [R/2]."""
    half = int(size * config.rotary_fraction) // 2
    plain = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return scaled(plain, config.rope_scaling, config.rope_base) if config.rope_scaling else plain


def _both(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.cos(angles), jnp.sin(angles)


def _once(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_both` in a loop, which XLA's CPU compiler fuses with nothing: it would compute them anew in each of the two
    fusions of each layer that read them, 7% of a small model's training step."""
    parts = lax.map(_both, angles.reshape(LOOPS, -1, angles.shape[-1]))
    return tuple(part.reshape(angles.shape) for part in parts)


def scaled(frequencies: jax.Array, scaling: Scaling, base: float) -> jax.Array:
    """The frequencies for sequences `factor` times as long as the original ones.

    "llama3", as in the code released with Llama 3.1: a frequency with at least high_freq_factor rotations in the
    original length is kept; one with at most low_freq_factor rotations is divided by `factor`; in between, the two are
    interpolated linearly in the rotations. "yarn" (section 3.2 there): the same linearly in the dimension, between
    those that have beta_fast and beta_slow rotations.
    """
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "dynamic":
            return frequencies
        case "llama3":
            rotations = scaling.original_max_length * frequencies / (2 * math.pi)
            span = scaling.high_freq_factor - scaling.low_freq_factor
            kept = jnp.clip((rotations - scaling.low_freq_factor) / span, 0, 1)
        case "yarn":
            half = len(frequencies)
            at = lambda turns: half * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / math.log(base)
            low, high = at(scaling.beta_fast), at(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * half - 1)
            kept = 1 - jnp.clip((jnp.arange(half) - low) / (high - low or 1e-3), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
