"""Prefill and decode with a KV cache, for sequences of different lengths; the decode loop stays on the device.

Prompts are padded on the right, so that slot s of a sequence holds its position s: slots beyond its length are never
seen, and are overwritten as it grows. Prompts and caches are padded to powers of two, so that one compiled program
serves all lengths in between. The tokens of a sequence depend on its prompt, its key and its positions only: not on
the other sequences in the batch, nor on how many tokens are decoded at a time.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm import ops
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.infer.sampling import GREEDY, Sampling, sample
from efflm.model import Cache, LanguageModel, Transformer, empty_cache
from efflm.parallel import sharding
from efflm.precision import policy_for

PAD_ID = -1  # in place of a token, where a sequence has ended
LEAST = 16  # the smallest bucket
CHUNK = 8  # tokens decoded between two reads by the host, where text is shown while it is generated


@flax.struct.dataclass
class State:
    """Sequences being generated. token_B is the newest token of each, which the cache does not hold yet; done_B:
    whether a stop token has ended it; keys_B: the random keys of its further tokens."""

    cache: Cache
    token_B: jax.Array
    done_B: jax.Array
    keys_B: jax.Array


def forward(model: LanguageModel, tokens_BT: jax.Array, **inputs: Any) -> tuple[jax.Array, Cache | None]:
    """Logits [B, T, V] and the cache after them, in the precision the model is stored in."""
    transformer = Transformer(model.config, policy_for(model.config))
    with sharding.mesh_of(model.params):
        return transformer.apply({"params": model.params}, tokens_BT, **inputs)


@functools.partial(jax.jit, static_argnames="cache_length")
def prefill(
    model: LanguageModel, tokens_BT: jax.Array, lengths_B: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Read prompts, of which lengths_B tokens count, into a fresh cache of `cache_length` positions.

    The logits [B, V] after the last token of each sequence, of ids that have a token, and the cache.
    """
    transformer = Transformer(model.config, policy_for(model.config))
    apply = functools.partial(transformer.apply, {"params": model.params})
    cache = empty_cache(model.config, tokens_BT.shape[0], cache_length, policy_for(model.config).compute)
    with sharding.mesh_of(model.params):
        x_BTD, cache = apply(tokens_BT, cache=cache, method=Transformer.final_states)
        last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
        logits_BV = apply(last_B1D, method=Transformer.unembed)[:, 0]
        return ops.possible(logits_BV, model.config.unused), cache.replace(length_B=lengths_B)


def _next(logits_BV: jax.Array, cache: Cache, keys_B: jax.Array, how: dict[str, Any]) -> jax.Array:
    """The token that follows the cache, drawn with a key of its position."""
    return sample(logits_BV, how, jax.vmap(jax.random.fold_in)(keys_B, cache.length_B))


@functools.partial(jax.jit, donate_argnames="cache")
def start(logits_BV: jax.Array, cache: Cache, keys_B: jax.Array, how: dict[str, Any], stops_K: jax.Array) -> State:
    """The first token of each sequence, from what `prefill` returned."""
    token_B = _next(logits_BV, cache, keys_B, how)
    return State(cache, token_B, jnp.isin(token_B, stops_K), keys_B)


def step(model: LanguageModel, state: State, how: dict[str, Any], stops_K: jax.Array) -> tuple[State, jax.Array]:
    """One more token for each sequence that has not ended: the new state, and the tokens [B], PAD_ID for the others."""
    with sharding.unconstrained():
        logits_BTV, cache = forward(model, state.token_B[:, None], cache=state.cache)
    token_B = _next(ops.possible(logits_BTV[:, -1], model.config.unused), cache, state.keys_B, how)
    keep = lambda old, new: jnp.where(state.done_B, old, new)
    cache = cache.replace(length_B=keep(state.cache.length_B, cache.length_B))
    done_B = state.done_B | jnp.isin(token_B, stops_K)
    return State(cache, keep(state.token_B, token_B), done_B, state.keys_B), keep(PAD_ID, token_B)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def decode(
    model: LanguageModel, state: State, how: dict[str, Any], stops_K: jax.Array, limit: jax.Array, steps: int
) -> tuple[jax.Array, State]:
    """`limit` tokens, at most `steps`, for each sequence, fewer where all have ended: ids [B, steps], PAD_ID where
    there is no token, and the state."""

    def one(carry):
        i, state, ids_BS = carry
        state, token_B = step(model, state, how, stops_K)
        return i + 1, state, lax.dynamic_update_slice_in_dim(ids_BS, token_B[:, None], i, axis=1)

    goes_on = lambda carry: (carry[0] < limit) & ~jnp.all(carry[1].done_B)
    empty_BS = jnp.full((state.token_B.shape[0], steps), PAD_ID, jnp.int32)
    _, state, ids_BS = lax.while_loop(goes_on, one, (jnp.int32(0), state, empty_BS))
    return ids_BS, state


def bucket(count: int, least: int = LEAST) -> int:
    """The power of two that `count` is padded to."""
    return max(least, 1 << (count - 1).bit_length())


def row_keys(seed: int, rows: int) -> jax.Array:
    """A key for each sequence; the key of sequence i does not depend on how many there are."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


def padded(prompts: Sequence[Sequence[int]], config: ModelConfig, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts side by side, int32 [B, bucket], and their lengths [B]. Raises InputError.

    A model is asked for no position beyond its max_length: learned positions end there, others were not trained.
    """
    require(len(prompts) > 0, "there is no prompt: give at least one")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    require(lengths_B.min() > 0, f"prompt {lengths_B.argmin()} is empty: give it at least one token")
    longest = int(lengths_B.max())
    require(
        longest + new <= config.max_length,
        f"the prompt has {longest} tokens and max_tokens is {new}, together {longest + new} positions, but the model's "
        f"max_length is {config.max_length}: shorten one of them",
    )
    tokens_BT = np.zeros((len(prompts), min(bucket(longest), config.max_length)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    top, bottom = int(tokens_BT.max()), int(tokens_BT.min())
    require(
        bottom >= 0 and top < config.vocabulary,
        f"token {top if top >= config.vocabulary else bottom} is not in the model's vocabulary of {config.vocabulary}: "
        "use the model's own tokenizer",
    )
    return tokens_BT, lengths_B


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    seed: int = 0,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """Continue every prompt: the new ids of each sequence, first one, then up to `chunk` at a time.

    A sequence ends with the first of the `stops`, or after max_tokens. Raises InputError.
    """
    require(max_tokens > 0, f"max_tokens is {max_tokens}, but must be positive")
    tokens_BT, lengths_B = padded(prompts, model.config, max_tokens)
    how, keys_B = sampling.arrays(), row_keys(seed, len(prompts))
    stops_K = np.pad(np.asarray(stops, np.int32), (0, bucket(len(stops) + 1) - len(stops)), constant_values=PAD_ID)
    rows = lambda ids_BS: [[int(i) for i in row if i != PAD_ID] for row in np.asarray(ids_BS)]

    def chunks() -> Iterator[list[list[int]]]:
        logits_BV, cache = prefill(model, tokens_BT, lengths_B, cache_length=bucket(int(lengths_B.max()) + max_tokens))
        state = start(logits_BV, cache, keys_B, how, stops_K)
        yield rows(state.token_B[:, None])
        done = 1
        while done < max_tokens and not np.all(state.done_B):
            limit = min(chunk, max_tokens - done)
            ids_BS, state = decode(model, state, how, stops_K, np.int32(limit), steps=chunk)
            yield rows(ids_BS)
            done += limit

    return chunks()  # a generator: the checks above run when `stream` is called, not at the first chunk


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue every prompt by up to max_tokens tokens, in one loop on the device: the new ids of each sequence, which
    ends before the first of the `stops`."""
    out: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_tokens, sampling, stops, seed, chunk=bucket(max_tokens)):
        for row, ids in zip(out, new, strict=True):
            row += ids
    return [without_stop(ids, stops) for ids in out]


def without_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids without the stop token that ends them, if one does."""
    return ids[:-1] if ids and ids[-1] in stops else ids
