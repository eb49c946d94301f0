"""The feed-forward part: SwiGLU (Shazeer 2020, arXiv 2002.05202) or a GELU between two products."""

import flax.linen as nn
import jax

from efflm.config import BlockConfig, ModelConfig
from efflm.model.linear import Linear
from efflm.precision import Policy


class FeedForward(nn.Module):
    """x_BTD in the compute dtype -> float32 [B, T, D]."""

    config: ModelConfig
    block: BlockConfig
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, hidden = self.config, self.block.hidden
        if config.feedforward == "swiglu":
            gate_BTF = Linear(hidden, config.bias, name="gate")(x_BTD)
            h_BTF = jax.nn.silu(gate_BTF) * Linear(hidden, config.bias, name="up")(x_BTD)
        else:
            h_BTF = jax.nn.gelu(Linear(hidden, config.bias, name="up")(x_BTD), approximate=True)
        residual_scale = (2 * len(config.blocks)) ** -0.5
        return Linear(config.width, config.bias, residual_scale, name="down")(h_BTF.astype(self.policy.compute))
