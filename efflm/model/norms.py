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
        dtype = str(jnp.dtype(self.dtype))
        return ops.Normed(x, self.scale, self.bias, epsilon=self.config.norm_epsilon, dtype=dtype)
