"""Losses and likelihoods, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from efflm.config import ModelConfig
from efflm.model import Transformer
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


def batch_logits(config: ModelConfig, policy: Policy, params: Any, batch: dict[str, jax.Array], scanned: bool = False):
    """Logits [B, T, V] of a batch of `data.packing`."""
    model = Transformer(config, policy, scanned)
    return model.apply({"params": params}, batch["inputs"], segments=batch["segments"], positions=batch["positions"])[0]


def language_model_loss(config: ModelConfig, policy: Policy = FLOAT32, scanned: bool = False):
    """loss_fn(params, frozen, batch, rng) -> (mean cross-entropy in nats, {}), for batches of `data.packing`."""

    def loss_fn(params: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array):
        del frozen, rng
        logits = batch_logits(config, policy, params, batch, scanned)
        return weighted_mean(next_token_nll(logits, batch["targets"]), target_weights(batch)), {}

    return loss_fn


def target_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """1.0 where a target belongs to a document, 0.0 on padding; float32 [B, T]."""
    return (batch["segments"] > 0).astype(jnp.float32)
