"""Log-probabilities of given tokens, and the likeliest tokens in their places."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm import ops
from efflm.infer.generate import padded
from efflm.model import LanguageModel, Transformer
from efflm.parallel import sharding
from efflm.precision import policy_for

BLOCK = 64  # positions whose logits are in memory at a time
TOP = 5


class LogProbabilities(NamedTuple):
    """Natural logarithms, of each token but the first: float32 [T - 1]; of the TOP likeliest in its place, from the
    likeliest down, float32 [T - 1, TOP], and which tokens these are, int32 [T - 1, TOP]."""

    tokens: np.ndarray
    top: np.ndarray
    top_ids: np.ndarray


def log_probabilities(model: LanguageModel, ids: Sequence[int]) -> LogProbabilities:
    """What the model says of each token after those before it, at temperature 1. Raises InputError."""
    tokens_BT, _ = padded([ids], model.config, new=0)
    T = len(ids) - 1
    return LogProbabilities(*(np.asarray(x)[:T] for x in _of_next(model, tokens_BT)))


@jax.jit
def _of_next(model: LanguageModel, tokens_1T: jax.Array) -> tuple[jax.Array, ...]:
    transformer = Transformer(model.config, policy_for(model.config))
    with sharding.mesh_of(model.params):
        x_1TD, _ = transformer.apply({"params": model.params}, tokens_1T, method=Transformer.final_states)

        def block(given):
            x_SD, next_S = given
            logits_SV = transformer.apply({"params": model.params}, x_SD[None], method=Transformer.unembed)[0]
            log_SV = jax.nn.log_softmax(ops.possible(logits_SV, model.config.unused).astype(jnp.float32))
            return jnp.take_along_axis(log_SV, next_S[:, None], axis=-1)[:, 0], *lax.top_k(log_SV, TOP)

        T, next_T = x_1TD.shape[1], jnp.roll(tokens_1T[0], -1)
        blocks = lambda x: jnp.pad(x, ((0, -T % BLOCK), *[(0, 0)] * (x.ndim - 1))).reshape(-1, BLOCK, *x.shape[1:])
        found = lax.map(block, (blocks(x_1TD[0]), blocks(next_T)))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
