"""A matmul with a named weight: the one place where modules fetch matrices."""

from typing import Any

import flax.linen as nn
import jax

from efflm import ops

STDDEV = 0.02  # of fresh matrices and embeddings alike, as in GPT-2: a layer's output is small compared with its input


def fetch(module: nn.Module, name: str, shape: tuple[int, ...], stddev: float = STDDEV) -> Any:
    """The parameter `name`: a float array or a compressed weight, of the logical `shape`. Raises ValueError."""
    weight = module.param(name, nn.initializers.normal(stddev), shape)
    if tuple(weight.shape) != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"{path} has shape {tuple(weight.shape)}, but the config says {shape}")
    return weight


class Linear(nn.Module):
    """x [..., in] -> float32 [..., features]. The dtype of x is the compute dtype."""

    features: int
    bias: bool
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.dot(x, fetch(self, "kernel", (x.shape[-1], self.features), self.init_scale * STDDEV))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y
