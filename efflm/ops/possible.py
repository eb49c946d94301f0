"""Logits of ids that have a token: vocabularies are padded, and a model's logits of padding mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np

LEAST = -1e30  # in place of -inf where differences of logits are formed; exp of it is 0

Ranges = tuple[tuple[int, int], ...]  # of ids, (first, one past the last), in order


def possible(logits: jax.Array, unused: Ranges, fill: float = -jnp.inf) -> jax.Array:
    """The logits [..., V] of ids that have a token: without those behind the last such id, so that vocabularies padded
    to different sizes are one, and with `fill` for others that have none. unused: these (config.model.ModelConfig)."""
    count = logits.shape[-1]
    if unused and unused[-1][1] == count:
        *unused, (count, _) = unused
        logits = logits[..., :count]
    if not unused:
        return logits
    known = np.ones(count, bool)
    for start, end in unused:
        known[start:end] = False
    return jnp.where(known, logits, fill)
