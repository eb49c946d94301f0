"""A linear layer, and the one place where modules fetch weights."""

from typing import Any

import flax.linen as nn
import jax

from efflm import ops
from efflm.config import ModelConfig
from efflm.model import params


def fetch(module: nn.Module, config: ModelConfig, name: str) -> Any:
    """The weight `name` of a module: an array or a compressed weight; None where the config has no such weight.

    Its logical shape must be the one in `params.table(config)`, which fresh weights are made from. Raises ValueError.
    """
    path = "/".join("block_0" if part == "blocks" else part for part in (*module.path, name))
    wanted = params.table(config).get(path)
    if wanted is None:
        return None
    if not module.has_variable("params", name):
        return module.param(name, wanted.initialize, wanted.shape)
    weight = module.get_variable("params", name)  # `param` would compare the shape of a compressed weight's first array
    if tuple(weight.shape) != wanted.shape:
        raise ValueError(f"{path} has shape {tuple(weight.shape)}, but the config says {wanted.shape}")
    return weight


class Linear(nn.Module):
    """x [..., in] -> float32 [..., out]. The dtype of x is the compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.dot(x, fetch(self, self.config, "kernel"))
        bias = fetch(self, self.config, "bias")
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
