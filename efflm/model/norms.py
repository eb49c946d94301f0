"""RMSNorm (Zhang 2019, arXiv 1910.07467) and LayerNorm (Ba 2016, arXiv 1607.06450)."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.late import recomputed


class Norm(nn.Module):
    """x [..., D] -> [..., D] in `dtype`; the statistics are float32."""

    kind: Literal["rms", "layer"]
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one_row = lambda parameter: parameter.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))

        def norm(x, scale, bias=None):
            x = x.astype(jnp.float32)
            if bias is not None:
                x = x - jnp.mean(x, axis=-1, keepdims=True)
            y = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * one_row(scale)
            return (y if bias is None else y + one_row(bias)).astype(self.dtype)

        parameters = [self.param("scale", nn.initializers.ones, x.shape[-1:])]
        if self.kind == "layer":
            parameters.append(self.param("bias", nn.initializers.zeros, x.shape[-1:]))
        return recomputed(norm)(x, *parameters)
