"""Prefill, decode and sampling with a KV cache; the decode loop stays on the device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.config import require
from efflm.model import Cache, LanguageModel, Transformer, empty_cache
from efflm.precision import policy_for


def forward(model: LanguageModel, tokens_BT: jax.Array, **inputs: Any) -> tuple[jax.Array, Cache | None]:
    """Logits [B, T, V] and the cache after them, in the precision the model is stored in."""
    transformer = Transformer(model.config, policy_for(model.params))
    return transformer.apply({"params": model.params}, tokens_BT, **inputs)


@functools.partial(jax.jit, static_argnames="length")
def prefill(model: LanguageModel, tokens_BT: jax.Array, length: int) -> tuple[jax.Array, Cache]:
    """Read a prompt into a fresh cache with room for `length` positions: the last logits [B, V] and the cache.

    Raises InputError if learned positions do not reach that far.
    """
    config = model.config
    require(
        config.position == "rotary" or length <= config.context,
        f"{length} positions asked of a model that learned {config.context}: shorten the prompt or the continuation",
    )
    cache = empty_cache(model.config, tokens_BT.shape[0], length, policy_for(model.params).compute)
    logits, cache = forward(model, tokens_BT, cache=cache)
    return logits[:, -1], cache


def sample(logits_BV: jax.Array, temperature: jax.Array, rng: jax.Array) -> jax.Array:
    """Token ids [B]: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    drawn = jax.random.categorical(rng, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode(
    model: LanguageModel, logits_BV: jax.Array, cache: Cache, temperature: jax.Array, rng: jax.Array, steps: int
) -> tuple[jax.Array, Cache]:
    """Sample `steps` tokens one after another, from the logits that follow the cache: ids [B, steps], the cache."""

    def one(carry, step_rng):
        logits, cache = carry
        tokens_B = sample(logits, temperature, step_rng)
        logits, cache = forward(model, tokens_B[:, None], cache=cache)
        return (logits[:, -1], cache), tokens_B

    (_, cache), tokens_SB = lax.scan(one, (logits_BV, cache), jax.random.split(rng, steps))
    return tokens_SB.T, cache


def generate(
    model: LanguageModel, prompt_BT: jax.Array, steps: int, temperature: float = 0.0, seed: int = 0
) -> jax.Array:
    """Continue every row of the prompt by `steps` tokens: ids [B, steps]."""
    logits, cache = prefill(model, prompt_BT, length=prompt_BT.shape[1] + steps)
    ids, _ = decode(model, logits, cache, jnp.float32(temperature), jax.random.key(seed), steps=steps)
    return ids
