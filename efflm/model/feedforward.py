"""The feed-forward part: SwiGLU or GeGLU (Shazeer 2020, arXiv 2002.05202), or a GELU (Hendrycks 2016, arXiv 1606.08415)
between two matmuls, in its exact form or in the tanh approximation."""

import flax.linen as nn
import jax

from efflm import ops
from efflm.config.model import ModelConfig
from efflm.model.linear import Linear, gathers, linears
from efflm.ops.recompute import recomputed
from efflm.parallel.sharding import constrain
from efflm.precision import Policy

GATES: dict[str, ops.Activation] = {"swiglu": "silu", "geglu": "gelu_tanh"}


class FeedForward(nn.Module):
    """x [B, T, D], to be normalized, and the residual float32 [B, T, D] or None -> its sum with this part."""

    config: ModelConfig
    policy: Policy

    @nn.compact
    def __call__(self, x: ops.Normed, residual_BTD: jax.Array | None) -> jax.Array:
        config, dtype = self.config, self.policy.compute
        place = lambda h_BTF: constrain(h_BTF, "batch", "length", "mlp")
        layer = lambda name: Linear(config, name=name)
        if config.gated:
            activation = GATES[config.feedforward]
            gate, up, down = layer("gate"), layer("up"), layer("down")
            biased = any(each.bias is not None for each in (gate, up, down))
            if not biased and not gathers(self):
                kernels = gate.kernel, up.kernel, down.kernel
                return ops.gated_feedforward(x, *kernels, residual_BTD, dtype, place, activation=activation)
            return down(place(ops.gated(*linears(x, (gate, up)), activation, dtype)), residual_BTD)
        tanh = config.feedforward == "gelu"
        gelu = recomputed(lambda up_BTF: jax.nn.gelu(up_BTF, approximate=tanh).astype(dtype))
        return layer("down")(place(gelu(layer("up")(x))), residual_BTD)
