"""RMSNorm (Zhang 2019, arXiv 1910.07467) and LayerNorm (Ba 2016, arXiv 1607.06450)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from efflm.config import ModelConfig
from efflm.model.linear import fetch
from efflm.ops.late import recomputed


class Norm(nn.Module):
    """x [..., D] -> [..., D] in `dtype`; the statistics are float32. A norm that has a bias is a LayerNorm."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def one_row(parameter):
            return parameter.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))

        def norm(x, scale, bias=None):
            x = x.astype(jnp.float32)
            if bias is not None:
                x = x - jnp.mean(x, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
            y = x * lax.rsqrt(variance + self.config.norm_epsilon) * one_row(scale)
            return (y if bias is None else y + one_row(bias)).astype(self.dtype)

        scale, bias = fetch(self, self.config, "scale"), fetch(self, self.config, "bias")
        return recomputed(norm)(x, scale) if bias is None else recomputed(norm)(x, scale, bias)
