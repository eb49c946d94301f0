"""A linear layer, and the one place where modules fetch weights.

Where the collection READ is mutable, linear layers sow what they read into it (see model.layerwise), and where OUTPUTS
is, a Transformer the outputs of its layers, and where PROBABILITIES is, the weights of attention (see
transformer.final_states_and_gathered); elsewhere nothing is gathered.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from efflm import ops
from efflm.config.model import ModelConfig
from efflm.model import params

READ = "read"  # the collection of what linear layers read; their weights have the same names in `params`
OUTPUTS = "outputs"  # the collection of what the layers give, in their order
PROBABILITIES = "probabilities"  # the collection of the weights of attention, by layer


def gathers(module: nn.Module, collection: str = READ) -> bool:
    """Whether what belongs in the collection is to be gathered."""
    return module.is_mutable_collection(collection) and not module.is_initializing()


def fetch(module: nn.Module, config: ModelConfig, name: str) -> Any:
    """The weight `name` of a module: an array or a compressed weight; None where the config has no such weight.

    Its logical shape must be the one in `params.table(config)`, which weights are initialized from. Raises ValueError.
    """
    path = "/".join(params.unstacked(part) for part in (*module.path, name))
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
    """x [..., in] -> float32 [..., out]. The dtype of x is the compute dtype. A residual [..., out] is added."""

    config: ModelConfig

    def setup(self):
        self.kernel = fetch(self, self.config, "kernel")
        self.bias = fetch(self, self.config, "bias")

    def __call__(self, x: Any, residual: jax.Array | None = None) -> jax.Array:
        x = read(x, [self])
        if self.bias is None:
            return ops.dot(x, self.kernel, residual)
        y = self.shifted(ops.dot(x, self.kernel))
        return y if residual is None else residual + y

    def shifted(self, y: jax.Array) -> jax.Array:
        """y plus the bias, if there is one."""
        if self.bias is None:
            return y
        return y + self.bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def linears(x: Any, layers: Sequence[Linear]) -> list[jax.Array]:
    """One x through several layers at once."""
    outs = ops.dots(read(x, layers), [layer.kernel for layer in layers])
    return [layer.shifted(y) for layer, y in zip(layers, outs, strict=True)]


def read(x: Any, layers: Sequence[Linear]) -> Any:
    """x, sown as what each of the layers reads, if that is gathered."""
    if not gathers(layers[0]):
        return x
    x = ops.normalize(x)
    for layer in layers:
        layer.sow(READ, "kernel", x)
    return x
