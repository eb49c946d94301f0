"""The norms of a Transformer: RMSNorm, or LayerNorm where there is a bias."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efflm import ops
from efflm.config.model import ModelConfig
from efflm.model.linear import fetch


class Norm(nn.Module):
    """x [..., D] -> [..., D] in `dtype`; the statistics are float32. A norm that has a bias is a LayerNorm."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self):
        self.scale = fetch(self, self.config, "scale")
        self.bias = fetch(self, self.config, "bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.normalize(self.of(x))

    def of(self, x: jax.Array) -> ops.Normed:
        """The same, left to the matmuls that read it (ops.dots)."""
        dtype, scale = str(jnp.dtype(self.dtype)), effective(self.config, self.scale)
        return ops.Normed(x, scale, self.bias, epsilon=self.config.norm_epsilon, dtype=dtype)


def effective(config: ModelConfig, scale: jax.Array) -> jax.Array:
    """What a norm multiplies by: its scale, in float32 where it is stored without the config's norm_offset."""
    return scale.astype(jnp.float32) + config.norm_offset if config.norm_offset else scale


def stored(config: ModelConfig, scale: jax.Array) -> jax.Array:
    """The inverse of `effective`, in its dtype."""
    return scale - config.norm_offset if config.norm_offset else scale
