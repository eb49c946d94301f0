"""RMSNorm (Zhang 2019, arXiv 1910.07467) and LayerNorm (Ba 2016, arXiv 1607.06450), alone or as part of a matmul."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.recompute import recomputed


@flax.struct.dataclass
class Normed:
    """x [..., D] to be normalized: scale [D], and the bias [D] of a LayerNorm. What reads it may do that on the way.

    dtype: of the result; the statistics are float32.
    """

    x: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None
    epsilon: float = flax.struct.field(pytree_node=False, default=1e-5)
    dtype: str = flax.struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


def normalize(x: Any) -> jax.Array:
    """What a Normed stands for; an array as it is."""
    if not isinstance(x, Normed):
        return x

    def one_row(parameter, like):
        return parameter.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))

    def norm(array, scale, bias=None):
        array = array.astype(jnp.float32)
        if bias is not None:
            array = array - jnp.mean(array, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(array), axis=-1, keepdims=True)
        y = array * lax.rsqrt(variance + x.epsilon) * one_row(scale, array)
        return (y if bias is None else y + one_row(bias, array)).astype(x.dtype)

    return recomputed(norm)(x.x, x.scale) if x.bias is None else recomputed(norm)(x.x, x.scale, x.bias)
