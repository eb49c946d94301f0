"""A mixture of experts: feed-forward parts of which each token is given to a few (Shazeer 2017, arXiv 1701.06538)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from efflm import ops
from efflm.config.model import BlockConfig, ModelConfig
from efflm.model.feedforward import FeedForward
from efflm.model.linear import Linear, gathers
from efflm.precision import Policy


class Experts(nn.Module):
    """x [B, T, D], to be normalized, and the residual float32 [B, T, D] or None -> its sum with this part.

    Every expert computes every token, and is added by its share, which is 0 for most; where there are too few tokens
    for all of them, as in decoding, those that no token is given to are not run. What an expert's matrices are found to
    read while something is calibrated is 0 in the rows of the other tokens.
    """

    config: ModelConfig
    block: BlockConfig
    policy: Policy

    @nn.compact
    def __call__(self, x: ops.Normed, residual_BTD: jax.Array | None) -> jax.Array:
        config, block, gathered = self.config, self.block, gathers(self)
        logits_BTE = Linear(config, name="router")(ops.normalize(x))
        shares_BTE = shares(logits_BTE, block.experts_per_token, config.renormalized)
        may_rest = math.prod(x.shape[:2]) * block.experts_per_token < block.experts and not self.is_initializing()
        out_BTD = jnp.zeros(x.shape, jnp.float32) if residual_BTD is None else residual_BTD
        for e in range(block.experts):
            expert, share_BT1 = FeedForward(config, self.policy, name=f"expert_{e}"), shares_BTE[..., e : e + 1]
            if gathered:
                given_BTD = expert(ops.normalize(x) * (share_BT1 > 0), None)
            elif may_rest:
                rest = lambda _, x: jnp.zeros(x.shape, jnp.float32)
                given_BTD = nn.cond(jnp.any(share_BT1 > 0), lambda expert, x: expert(x, None), rest, expert, x)
            else:
                given_BTD = expert(x, None)
            out_BTD = out_BTD + share_BT1 * given_BTD
        return out_BTD


def shares(logits_BTE: jax.Array, count: int, renormalized: bool) -> jax.Array:
    """The softmax over the experts, float32 [B, T, E], 0 but for the `count` largest of each token, of equals the
    earlier ones; renormalized: these sum to 1."""
    p_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    _, chosen_BTk = lax.top_k(lax.stop_gradient(p_BTE), count)
    kept_BTE = jnp.any(chosen_BTk[..., None] == jnp.arange(p_BTE.shape[-1])[None, None, None], axis=-2)
    p_BTE = jnp.where(kept_BTE, p_BTE, 0.0)
    return p_BTE / jnp.sum(p_BTE, axis=-1, keepdims=True) if renormalized else p_BTE
