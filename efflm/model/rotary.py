"""The angles of rotary position embedding (Su 2021, arXiv 2104.09864)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.config.model import BlockConfig, ModelConfig, Scaling, YarnScaling
from efflm.parallel.sharding import is_whole

LOOPS, MANY = 2, 64  # a loop of one turn is no loop to the compiler; of fewer positions it costs more than it spares


Tables = tuple[jax.Array, jax.Array]


def of_layers(positions_BT: jax.Array, config: ModelConfig) -> list[Tables | None]:
    """The `tables` of each layer, the very same for layers that rotate alike; None without rotary positions."""
    made: dict[Any, Tables | None] = {}
    ropes = [_rope(config, block) if config.position == "rotary" else None for block in config.blocks]
    for rope in ropes:
        if rope not in made:
            made[rope] = tables(positions_BT, *rope) if rope else None
    return [made[rope] for rope in ropes]


def _rope(config: ModelConfig, block: BlockConfig) -> tuple[int, float, Scaling | None]:
    """How many dimensions of a head are rotated, from which base, and how that is scaled."""
    local = block.window and config.local_rope_base
    rotated = 2 * (int(block.head_dim * config.rotary_fraction) // 2)
    return rotated, config.local_rope_base if local else config.rope_base, None if local else config.rope_scaling


def tables(positions_BT: jax.Array, rotated: int, base: float, scaling: Scaling | None = None) -> Tables:
    """Cosines and sines [B, T, R/2] of the angles position * base^(-2i/R), float32, which ops.rotate reads, for R
    rotated dimensions of a head."""
    half = rotated // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling:
        frequencies = scaled(frequencies, scaling, base)
    angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    count = angles.shape[0] * angles.shape[1]
    if count % LOOPS or count < MANY or not is_whole():
        cos_sin = _both(angles)
    else:
        cos_sin = lax.platform_dependent(angles, cpu=_once, default=_both)
    if not isinstance(scaling, YarnScaling):
        return cos_sin
    return tuple(part * scaling.attention_factor for part in cos_sin)


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
