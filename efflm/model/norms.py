"""RMSNorm (Zhang 2019, arXiv 1910.07467) and LayerNorm (Ba 2016, arXiv 1607.06450)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Norm(nn.Module):
    """x [..., D] -> float32 [..., D]; the statistics are float32."""

    kind: Literal["rms", "layer"]
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        one_row = (1,) * (x.ndim - 1) + (-1,)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        y = y * self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(jnp.float32).reshape(one_row)
        if self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32).reshape(one_row)
        return y
