"""The feed-forward part: SwiGLU (Shazeer 2020, arXiv 2002.05202) or a GELU (Hendrycks 2016, arXiv 1606.08415) between
two matmuls, in its exact form or in the tanh approximation."""

import flax.linen as nn
import jax

from efflm.config import ModelConfig
from efflm.model.linear import Linear
from efflm.model.sharding import constrain
from efflm.ops.late import recomputed
from efflm.precision import Policy


class FeedForward(nn.Module):
    """x_BTD in the compute dtype -> float32 [B, T, D]."""

    config: ModelConfig
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, dtype = self.config, self.policy.compute
        swiglu = recomputed(lambda gate_BTF, up_BTF: (jax.nn.silu(gate_BTF) * up_BTF).astype(dtype))
        tanh = config.feedforward == "gelu"
        gelu = recomputed(lambda up_BTF: jax.nn.gelu(up_BTF, approximate=tanh).astype(dtype))
        if config.feedforward == "swiglu":
            gate_BTF = Linear(config, name="gate")(x_BTD)
            h_BTF = swiglu(gate_BTF, Linear(config, name="up")(x_BTD))
        else:
            h_BTF = gelu(Linear(config, name="up")(x_BTD))
        h_BTF = constrain(h_BTF, "batch", "length", "mlp")
        return Linear(config, name="down")(h_BTF)
