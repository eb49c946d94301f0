"""How the next token is drawn from logits.

In this order, each on what the one before it has left, renormalized:

1. temperature: p = softmax(logits / temperature); 0 takes the likeliest token and nothing below matters;
2. top-k (Fan 2018, arXiv 1805.04833): the k likeliest tokens, of equals those with the lower ids;
3. top-p (Holtzman 2019, arXiv 1904.09751): the smallest set of the likeliest tokens whose mass reaches top_p;
4. min-p (Nguyen 2024, arXiv 2407.01082): the tokens at least min_p times as likely as the likeliest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a user chooses; the defaults take the likeliest token. Raises InputError."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        # Not `< 0`: a NaN must not pass.
        require(
            self.temperature >= 0 and np.isfinite(self.temperature),
            f"temperature is {self.temperature}, but must be at least 0, which takes the likeliest token",
        )
        require(
            0 <= self.top_k < 1 << 31,
            f"top_k is {self.top_k}, but must be from 1 to {(1 << 31) - 1}, or 0 for all tokens",
        )
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be in (0, 1]; 1 keeps all tokens")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}, but must be in [0, 1]; 0 keeps all tokens")

    def arrays(self) -> dict[str, np.generic]:
        """The same as arguments of a compiled program, which is then one for all choices."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "min_p": np.float32(self.min_p),
        }


GREEDY = Sampling()


def ranked(logits_BV: jax.Array, how: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Token ids [B, V] from the likeliest down, and their log-probabilities up to a constant for each sequence.

    float32; -inf for a token that one of the filters leaves out. The temperature must be positive.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1).astype(jnp.float32) / how["temperature"]
    rank_1V = jnp.arange(logits_BV.shape[-1])[None]
    kept_BV = (how["top_k"] == 0) | (rank_1V < how["top_k"])
    p_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    kept_BV = kept_BV & ((before_BV < how["top_p"]) | (how["top_p"] >= 1))  # a sum may round up to 1 too early
    kept_BV = kept_BV & (p_BV >= how["min_p"] * p_BV[:, :1])
    # Rounding of the sums must not drop the likeliest token.
    return order_BV, jnp.where(kept_BV | (rank_1V == 0), sorted_BV, -jnp.inf)


def _chosen(how: dict[str, Any], greedy: Any, plain: Any, filtered: Any) -> jax.Array:
    """What one of these functions gives: of the likeliest token alone, of all, or of those that a filter leaves.
    Sorting a vocabulary takes milliseconds: only where a filter asks for it."""
    filters = (how["top_k"] > 0) | (how["top_p"] < 1) | (how["min_p"] > 0)
    return lax.cond(how["temperature"] > 0, lambda: lax.cond(filters, filtered, plain), greedy)


def probabilities(logits_BV: jax.Array, how: dict[str, Any]) -> jax.Array:
    """The distribution that `sample` draws from, float32 [B, V]; with temperature 0 all of it on the likeliest."""

    def filtered() -> jax.Array:
        order_BV, scores_BV = ranked(logits_BV, how)
        place_BV = jnp.argsort(order_BV, axis=-1)
        return jnp.take_along_axis(jax.nn.softmax(scores_BV, axis=-1), place_BV, axis=-1)

    plain = lambda: jax.nn.softmax(logits_BV.astype(jnp.float32) / how["temperature"], axis=-1)
    greedy = lambda: jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=jnp.float32)
    return _chosen(how, greedy, plain, filtered)


def sample(logits_BV: jax.Array, how: dict[str, Any], keys_B: jax.Array) -> jax.Array:
    """Token ids int32 [B], each sequence with its own key. how: Sampling.arrays()."""
    draw = jax.vmap(jax.random.categorical)

    def filtered() -> jax.Array:
        order_BV, scores_BV = ranked(logits_BV, how)
        chosen_B = draw(keys_B, scores_BV)
        return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)

    plain = lambda: draw(keys_B, logits_BV.astype(jnp.float32) / how["temperature"]).astype(jnp.int32)
    return _chosen(how, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), plain, filtered)
