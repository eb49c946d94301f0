"""Losses and likelihoods, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops
from efflm.config import ModelConfig, Remat
from efflm.model import Transformer, sequence_parallel
from efflm.precision import FLOAT32, Policy


def next_token_nll(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def kl_divergence(reference_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
    """KL(reference || model) in nats at every position, float32 [B, T], from two sets of logits."""
    log_p = jax.nn.log_softmax(reference_BTV.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def weighted_mean(values_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Mean over the positions, each with its weight; 0 where all weights are 0."""
    return jnp.sum(values_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1)


def batch_logits(config: ModelConfig, policy: Policy, params: Any, batch: dict[str, jax.Array]):
    """Logits [B, T, V] of a batch of `data.packing`."""
    return Transformer(config, policy).apply({"params": params}, batch["inputs"], **_where(batch))[0]


def _where(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"segments": batch["segments"], "positions": batch["positions"]}


def language_model_loss(
    config: ModelConfig,
    policy: Policy = FLOAT32,
    *,
    scanned: bool = False,
    remat: Remat = "none",
    z_loss: float = 0.0,
):
    """loss_fn(params, frozen, batch, rng) -> (mean loss in nats, its parts), for batches of `data.packing`.

    The loss is the cross-entropy, weighted as `target_weights` says, plus z_loss * log_normalizer^2. It never holds
    the logits of the whole batch (see ops.cross_entropy).
    """
    model = Transformer(config, policy, scanned, remat)

    def sums(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        x_BTD, _ = model.apply({"params": params}, batch["inputs"], **_where(batch), method=Transformer.final_states)
        w, weights_BT = params["embedding" if config.tied else "unembedding"], target_weights(batch)
        total, nll = ops.cross_entropy(x_BTD, w, batch["targets"], weights_BT, tied=config.tied, z_weight=z_loss)
        return total, nll, jnp.sum(weights_BT)

    def loss_fn(params: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array):
        del frozen, rng
        total, nll, weight = sequence_parallel.spread(sums, params, batch)
        mean = lambda value: value / jnp.maximum(weight, 1e-9)
        return mean(total), {"weight": weight} | ({"cross_entropy": mean(nll)} if z_loss else {})

    return loss_fn


def target_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """The weight of every target, float32 [B, T]: the batch's own "weights" if it has any, and 0.0 on padding."""
    real_BT = (batch["segments"] > 0).astype(jnp.float32)
    return real_BT * batch["weights"].astype(jnp.float32) if "weights" in batch else real_BT
