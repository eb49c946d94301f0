"""Speculative decoding (Leviathan 2022, arXiv 2211.17192, algorithm 1; Chen 2023, arXiv 2302.01318).

A small draft model proposes some tokens, and the target model reads them in one forward pass. Of p, the target's
distribution, and q, the draft's, a proposal x stays with probability min(1, p(x) / q(x)); in place of the first that
does not, a token is drawn from max(p - q, 0), normalized; after proposals that all stay, one more is drawn from p. So
what is written is distributed as the target alone would write it; with temperature 0 it is the same text, but for
logits that are equal up to rounding. What it costs less is time, where reading several tokens takes the target little
longer than reading one.

As in infer.generate, the loop stays on the device, sequences of different lengths do not change each other, and one
compiled program serves all lengths up to a power of two.
"""

import dataclasses
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
from efflm.infer.generate import PAD_ID, bucket, forward, padded, prefill, row_keys, start, without_stop
from efflm.infer.sampling import GREEDY, Sampling, probabilities
from efflm.model import Cache, LanguageModel, require_same_tokenizer
from efflm.parallel import sharding

DRAW, ACCEPT, REPLACE = range(3)  # what a random key of a position is for


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Over all sequences: tokens that the draft proposed, those that stayed, and forward passes of the target."""

    drafted: int
    accepted: int
    passes: int

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.drafted, 1)


@flax.struct.dataclass
class State:
    """Sequences being generated. token_B: the newest token of each, which neither cache holds yet; before_B: the one
    before it, which the draft's cache does not hold either; ids_BS: those written so far, count_B of each; done_B:
    whether a stop token or the limit has ended it; accepted, passes: see Statistics."""

    target: Cache
    draft: Cache
    before_B: jax.Array
    token_B: jax.Array
    ids_BS: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    accepted: jax.Array
    passes: jax.Array


def keys_at(keys_B: jax.Array, positions_B: jax.Array, use: int) -> jax.Array:
    """A key for each sequence's position and for what it is used."""
    return jax.vmap(lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), use))(
        keys_B, positions_B
    )


def _drawn(p_BV: jax.Array, keys_B: jax.Array, how: dict[str, Any]) -> jax.Array:
    """A token of each distribution; with temperature 0 the likeliest, with no random numbers for the vocabulary."""
    draw = lambda: jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BV)).astype(jnp.int32)
    return lax.cond(how["temperature"] > 0, draw, lambda: jnp.argmax(p_BV, axis=-1).astype(jnp.int32))


def propose(
    draft: LanguageModel,
    cache: Cache,
    before_B: jax.Array,
    token_B: jax.Array,
    keys_B: jax.Array,
    how: dict[str, Any],
    ahead: int,
) -> tuple[jax.Array, jax.Array, Cache]:
    """`ahead` tokens after before_B and token_B by the draft: ids [B, ahead], their distributions [B, ahead, V], and
    the cache with these two and all of them but the last, which need not be read unless it stays."""

    def one(cache, read_BT):
        logits_BTV, cache = forward(draft, read_BT, cache=cache)
        q_BV = probabilities(ops.possible(logits_BTV[:, -1], draft.config.unused), how)
        return cache, _drawn(q_BV, keys_at(keys_B, cache.length_B, DRAW), how), q_BV

    def more(carry, _):
        cache, token_B = carry
        cache, token_B, q_BV = one(cache, token_B[:, None])
        return (cache, token_B), (token_B, q_BV)

    cache, first_B, q_BV = one(cache, jnp.stack([before_B, token_B], axis=1))
    (cache, _), (ids_AB, q_ABV) = lax.scan(more, (cache, first_B), length=ahead - 1)
    ids_BA = jnp.concatenate([first_B[None], ids_AB]).T
    return ids_BA, jnp.concatenate([q_BV[None], q_ABV]).swapaxes(0, 1), cache


def verify(
    p_BTV: jax.Array,
    q_BAV: jax.Array,
    ids_BA: jax.Array,
    keys_B: jax.Array,
    positions_B: jax.Array,
    how: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """How many of the proposals [B, A] stay, int32 [B], and the token that follows those, int32 [B].

    p_BTV: the target's distributions, T = A + 1: of each proposal and of what follows them all. positions_B: of the
    first proposal.
    """
    A = ids_BA.shape[1]
    chosen = lambda p_BAV: jnp.take_along_axis(p_BAV, ids_BA[..., None], axis=-1)[..., 0]
    draws = [jax.vmap(jax.random.uniform)(keys_at(keys_B, positions_B + i, ACCEPT)) for i in range(A)]
    stays_BA = jnp.stack(draws, axis=1) * chosen(q_BAV) < chosen(p_BTV[:, :A])
    count_B = jnp.sum(jnp.cumprod(stays_BA.astype(jnp.int32), axis=1), axis=1)
    # Behind the last proposal there is no q: all of p is left.
    q_BTV = jnp.pad(q_BAV, ((0, 0), (0, 1), (0, 0)))
    at = lambda p_BTV: jnp.take_along_axis(p_BTV, count_B[:, None, None], axis=1)[:, 0]
    p_BV = at(p_BTV)
    left_BV = jnp.maximum(p_BV - at(q_BTV), 0.0)
    # Where p = q up to rounding nothing is left, and rejecting has no probability but for that rounding.
    left_BV = jnp.where(jnp.sum(left_BV, axis=-1, keepdims=True) > 0, left_BV, p_BV)
    return count_B, _drawn(left_BV, keys_at(keys_B, positions_B + count_B, REPLACE), how)


def step(
    target: LanguageModel,
    draft: LanguageModel,
    state: State,
    keys_B: jax.Array,
    how: dict[str, Any],
    stops_K: jax.Array,
    limit: jax.Array,
    ahead: int,
) -> State:
    """One pass of the target: 1 to `ahead` + 1 more tokens for each sequence that has not ended."""
    had_B = state.target.length_B
    with sharding.unconstrained():
        ids_BA, q_BAV, drafted = propose(draft, state.draft, state.before_B, state.token_B, keys_B, how, ahead)
        read_BT = jnp.concatenate([state.token_B[:, None], ids_BA], axis=1)
        logits_BTV, read = forward(target, read_BT, cache=state.target)
    B, T, V = logits_BTV.shape
    logits_MV = ops.possible(logits_BTV.reshape(B * T, V), target.config.unused)
    p_BTV = probabilities(logits_MV, how).reshape(B, T, -1)
    count_B, token_B = verify(p_BTV, q_BAV, ids_BA, keys_B, had_B + 1, how)

    goes_B = ~state.done_B
    keep = lambda old, new: jnp.where(goes_B, new, old)
    new_BT = jnp.where(jnp.arange(T)[None] == count_B[:, None], token_B[:, None], jnp.pad(ids_BA, ((0, 0), (0, 1))))
    written_BT = jnp.arange(T)[None] <= count_B[:, None]
    row = lambda ids_S, new_T, at: lax.dynamic_update_slice(ids_S, new_T, (at,))
    ids_BS = jnp.where(goes_B[:, None], jax.vmap(row)(state.ids_BS, new_BT, state.count_B), state.ids_BS)
    stopped_B = jnp.any(written_BT & jnp.isin(new_BT, stops_K), axis=1)
    total_B = state.count_B + count_B + 1
    length_B = keep(had_B, had_B + 1 + count_B)
    return State(
        target=read.replace(length_B=length_B),
        draft=drafted.replace(length_B=length_B - 1),
        before_B=keep(state.before_B, jnp.take_along_axis(read_BT, count_B[:, None], axis=1)[:, 0]),
        token_B=keep(state.token_B, token_B),
        ids_BS=ids_BS,
        count_B=keep(state.count_B, total_B),
        done_B=state.done_B | stopped_B | (total_B >= limit),
        accepted=state.accepted + jnp.sum(count_B, where=goes_B),
        passes=state.passes + jnp.sum(goes_B),
    )


@functools.partial(jax.jit, static_argnames="ahead", donate_argnames="state")
def decode(
    target: LanguageModel,
    draft: LanguageModel,
    state: State,
    keys_B: jax.Array,
    how: dict[str, Any],
    stops_K: jax.Array,
    limit: jax.Array,
    passes: jax.Array,
    ahead: int,
) -> State:
    """The state after `passes` passes, fewer where all sequences have ended or have `limit` tokens."""

    def one(carry):
        i, state = carry
        return i + 1, step(target, draft, state, keys_B, how, stops_K, limit, ahead)

    goes_on = lambda carry: (carry[0] < passes) & ~jnp.all(carry[1].done_B)
    return lax.while_loop(goes_on, one, (jnp.int32(0), state))[1]


def stream(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    seed: int = 0,
    ahead: int = 4,
    passes: int = 1,
) -> Iterator[tuple[list[list[int]], Statistics]]:
    """Continue every prompt by up to max_tokens tokens, up to the first of the `stops`: the new ids of each sequence,
    first one, then those of `passes` passes of the target at a time, and the statistics so far.

    ahead: tokens that the draft proposes for each pass. Raises InputError.
    """
    require(type(ahead) is int and ahead > 0, f"ahead is {ahead!r}, but must be a positive whole number")
    require(max_tokens > 0, f"max_tokens is {max_tokens}, but must be positive")
    require_same_tokenizer(draft, target, "draft", "model")
    padded(prompts, draft.config, max_tokens)
    tokens_BT, lengths_B = padded(prompts, target.config, max_tokens)
    tokens_BT = tokens_BT[:, : min(tokens_BT.shape[1], draft.config.max_length)]
    how, keys_B = sampling.arrays(), row_keys(seed, len(prompts))
    stops_K = np.pad(np.asarray(stops, np.int32), (0, bucket(len(stops) + 1) - len(stops)), constant_values=PAD_ID)
    room = bucket(int(lengths_B.max()) + max_tokens + ahead + 1)  # what is proposed may go beyond the limit
    cut = lambda ids: ids[: next((i for i, token in enumerate(ids, 1) if token in stops), len(ids))]

    def chunks() -> Iterator[tuple[list[list[int]], Statistics]]:
        logits_BV, cache = prefill(target, tokens_BT, lengths_B, cache_length=room)
        _, draft_cache = prefill(draft, tokens_BT, lengths_B, cache_length=room)
        first = start(logits_BV, cache, keys_B, how, stops_K)
        B = len(prompts)
        ids_BS = jnp.full((B, bucket(max_tokens + ahead + 1)), PAD_ID, jnp.int32).at[:, 0].set(first.token_B)
        state = State(
            target=first.cache,
            draft=draft_cache.replace(length_B=draft_cache.length_B - 1),
            before_B=jnp.take_along_axis(jnp.asarray(tokens_BT), draft_cache.length_B[:, None] - 1, axis=1)[:, 0],
            token_B=first.token_B,
            ids_BS=ids_BS,
            count_B=jnp.ones(B, jnp.int32),
            done_B=first.done_B | (max_tokens <= 1),
            accepted=jnp.int32(0),
            passes=jnp.int32(0),
        )
        shown_B = [0] * B
        while True:
            counts_B = np.minimum(np.asarray(state.count_B), max_tokens).tolist()
            written = zip(np.asarray(state.ids_BS).tolist(), shown_B, counts_B, strict=True)
            told = Statistics(ahead * int(state.passes), int(state.accepted), int(state.passes))
            yield [cut(ids[since:until]) for ids, since, until in written], told
            if np.all(state.done_B):
                return
            limits, shown_B = (np.int32(max_tokens), np.int32(passes)), counts_B
            state = decode(target, draft, state, keys_B, how, stops_K, *limits, ahead=ahead)

    return chunks()  # a generator, as in infer.generate


def generate(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    seed: int = 0,
    ahead: int = 4,
) -> tuple[list[list[int]], Statistics]:
    """`stream` in one loop on the device: all new ids of each sequence, which ends before the first of the `stops`."""
    chunks = list(stream(target, draft, prompts, max_tokens, sampling, stops, seed, ahead, passes=max_tokens))
    out = [[token for rows, _ in chunks for token in rows[i]] for i in range(len(prompts))]
    return [without_stop(ids, stops) for ids in out], chunks[-1][1]
