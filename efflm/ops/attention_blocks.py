"""The portable form of attention: exact and in blocks, so that it holds no T x T array (FlashAttention, Dao 2022,
arXiv 2205.14135).

Queries are read in blocks, the softmax runs online over blocks of keys, and the backward pass computes the weights
again from the log-normalizers. Scores, softmax and sums are float32. Inside, the queries of a group lie side by side:
of q_BKQH, with Q = T * N / K, row r is at position r // (N / K). The backward pass holds its scores as [S, Q]: so every
matmul but one reads its operands as they lie (see ops.dot.transposed).
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.dot import transposed
from efflm.ops.recompute import late
from efflm.ops.soft_cap import slope, soft_cap

MASKED = -1e30  # the score of a key that a query may not see: finite, so that a wholly masked block stays finite too
UNROLLED = 1024  # sequences up to this long are cut into a few blocks written out one by one, each with its own keys
BLOCK = 512  # queries and keys in a block of the loops beyond that


@flax.struct.dataclass
class _Placement:
    """The slots and the segments (or None) of queries or keys, int32 [B or 1, 1, queries or keys]."""

    slots: jax.Array
    segments: jax.Array | None


def unrolled(T: int, S: int) -> bool:
    """Whether the blocks (`spans`) are written out one by one, and not looped over."""
    return T * S <= UNROLLED**2


def spans(T: int, S: int, window: int, in_order: bool) -> list[tuple[int, int, int, int]]:
    """(first query, its end, first key, its end) of each block, in positions; in order, queries are the last keys."""
    if not in_order:
        return [(0, T, 0, S)]
    size, offset = max(64, -(-T // 4)), S - T
    blocks = [(t, min(t + size, T)) for t in range(0, T, size)]
    return [(t, end, max(0, offset + t - window + 1) if window else 0, offset + end) for t, end in blocks]


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, *, slots_BT, window: int, cap: float) -> jax.Array:
    """See ops.attention; key_segments_BS are given where segments_BT are."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    group, in_order = N // K, slots_BT is None
    placed = lambda x_BT, times=1: None if x_BT is None else jnp.repeat(x_BT, times, axis=1)[:, None]
    order = jnp.arange(S, dtype=jnp.int32)[None]
    queries = _Placement(placed(order[:, S - T :] if in_order else slots_BT, group), placed(segments_BT, group))
    keys = _Placement(placed(order), placed(key_segments_BS))
    q_BKQH = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    out_BKQH = _attend(q_BKQH, k_BKSH, v_BKSH, queries, keys, window, cap, group, in_order)
    return out_BKQH.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


# --- matmuls and masks of one block ---------------------------------------------------------------------------------


def _matmul(a: jax.Array, b: jax.Array, transpose: bool = False) -> jax.Array:
    """[B, K, M, X] @ [B, K, X, N], or with `transpose` @ [B, K, N, X]^T -> float32 [B, K, M, N]."""
    dimensions = ((3,), (3 if transpose else 2,)), ((0, 1), (0, 1))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _masked(queries: _Placement, keys: _Placement, window: int, keys_first: bool = False) -> jax.Array:
    """True where a query may not see a key, [B or 1, 1, queries, keys]; `keys_first`: [B or 1, 1, keys, queries]."""
    of_query, of_key = (..., slice(None), None), (..., None, slice(None))
    if keys_first:
        of_query, of_key = of_key, of_query
    query, key = queries.slots[of_query], keys.slots[of_key]
    masked = key > query
    if window:
        masked = masked | (key <= query - window)
    if queries.segments is not None:
        masked = masked | (queries.segments[of_query] != keys.segments[of_key])
    return masked


def _forward_block(q, queries: _Placement, k, v, keys: _Placement, window: int, cap: float):
    """Of some queries and some keys: the sum of exp(score - top) v, of exp(score - top), and top; float32."""
    scores_BKQS = soft_cap(_matmul(q, k, transpose=True) * q.shape[-1] ** -0.5, cap)
    scores_BKQS = jnp.where(_masked(queries, keys, window), MASKED, scores_BKQS)
    top = jnp.max(scores_BKQS, axis=-1, keepdims=True)
    weights_BKQS = jnp.exp(scores_BKQS - top)
    return _matmul(weights_BKQS.astype(v.dtype), v), jnp.sum(weights_BKQS, axis=-1, keepdims=True), top


def _softmax(out, total, top):
    """The sums of `_forward_block` as attention, and the log-normalizers [B, K, Q]. Both are 0 for a query that sees no
    key: in the backward pass the weights of masked keys are then 0."""
    blind = (top <= MASKED / 2) & ~jnp.isnan(total)
    return jnp.where(blind, 0.0, out / total), jnp.where(blind, 0.0, top + jnp.log(total))[..., 0]


def _backward_block(q, g, normalizer, inner, queries: _Placement, k, v, keys: _Placement, window: int, cap: float):
    """The float32 gradients of some queries, keys and values through each other.

    g is the gradient of the output in the compute dtype; normalizer and inner = sum(g * output) are [B, K, Q].
    """
    scale = q.shape[-1] ** -0.5
    capped_BKSQ = soft_cap(_matmul(k, q, transpose=True) * scale, cap)
    scores_BKSQ = jnp.where(_masked(queries, keys, window, keys_first=True), MASKED, capped_BKSQ)
    weights_BKSQ = jnp.exp(scores_BKSQ - normalizer[:, :, None, :])
    from_weights = _matmul(v, g, transpose=True)
    ds_BKSQ = weights_BKSQ * (from_weights - inner[:, :, None, :]) * scale * slope(capped_BKSQ, cap)
    ds_BKSQ = ds_BKSQ.astype(q.dtype)
    return _matmul(transposed(ds_BKSQ), k), _matmul(ds_BKSQ, q), _matmul(weights_BKSQ.astype(q.dtype), g)


# --- all blocks, one after another -----------------------------------------------------------------------------------


def _part(tree: Any, start: Any, size: int) -> Any:
    """Some queries or keys of arrays [B or 1, K or 1, queries or keys, ...]."""
    if isinstance(start, int):
        return jax.tree.map(lambda x: lax.slice_in_dim(x, start, start + size, axis=2), tree)
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=2), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q, k, v, queries: _Placement, keys: _Placement, window: int, cap: float, group: int, in_order: bool):
    return _attend_forward(q, k, v, queries, keys, window, cap, group, in_order)[0]


def _attend_forward(q, k, v, queries, keys, window, cap, group, in_order):
    of_queries, of_keys, (T, S) = (q, queries), (k, v, keys), (q.shape[2] // group, k.shape[2])
    if unrolled(T, S):
        found = []
        for q_lo, q_hi, k_lo, k_hi in spans(T, S, window, in_order):
            some, seen = _part(of_queries, q_lo * group, (q_hi - q_lo) * group), _part(of_keys, k_lo, k_hi - k_lo)
            found.append(_softmax(*_forward_block(*some, *seen, window, cap)))
        out, normalizer = (jnp.concatenate(parts, axis=2) for parts in zip(*found))
    else:
        out, normalizer = _loop_forward(of_queries, of_keys, window, cap, group)
    return out, (q, k, v, queries, keys, out, normalizer)


def _attend_backward(window, cap, group, in_order, residuals, g):
    q, k, v, queries, keys, out, normalizer = residuals
    T, S = q.shape[2] // group, k.shape[2]
    q = late(q, g)
    inner, g = jnp.sum(g * out, axis=-1), g.astype(q.dtype)
    of_queries, of_keys = (q, g, normalizer, inner, queries), (k, v, keys)
    if unrolled(T, S):
        found = []
        for q_lo, q_hi, k_lo, k_hi in spans(T, S, window, in_order):
            some, seen = _part(of_queries, q_lo * group, (q_hi - q_lo) * group), _part(of_keys, k_lo, k_hi - k_lo)
            dq, *of_seen = _backward_block(*some, *seen, window, cap)
            found.append((dq, *(jnp.pad(x, ((0, 0), (0, 0), (k_lo, S - k_hi), (0, 0))) for x in of_seen)))
        dqs, dks, dvs = zip(*found)
        dq, dk, dv = jnp.concatenate(dqs, axis=2), sum(dks), sum(dvs)
    else:
        dq, dk, dv = _loop_backward(of_queries, of_keys, window, cap, group)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_blocks(of_queries: tuple, of_keys: tuple, group: int) -> tuple[tuple, tuple]:
    """Both filled up to whole blocks, with zeros. Queries that are not there repeat the last one's place, and get
    gradient zero; keys that are not there lie beyond every slot."""

    def fill(x, unit, mode="constant"):
        return jnp.pad(x, [(0, -x.shape[2] % unit) if axis == 2 else (0, 0) for axis in range(x.ndim)], mode=mode)

    (*arrays, queries), (*others, keys), size = of_queries, of_keys, BLOCK * group
    queries = jax.tree.map(lambda x: fill(x, size, mode="edge"), queries)
    keys = jax.tree.map(lambda x: fill(x, BLOCK), keys)
    keys = keys.replace(slots=jnp.arange(keys.slots.shape[2], dtype=jnp.int32)[None, None])
    return (*(fill(x, size) for x in arrays), queries), (*(fill(x, BLOCK) for x in others), keys)


def _key_blocks(queries: _Placement, window: int) -> tuple[Any, Any]:
    """The first of the blocks of keys that some queries see, and the one past the last."""
    first = jnp.maximum(jnp.min(queries.slots) - window + 1, 0) // BLOCK if window else 0
    return first, jnp.max(queries.slots) // BLOCK + 1


def _loop_forward(of_queries, of_keys, window, cap, group):
    (B, K, Q, H), size = of_queries[0].shape, BLOCK * group
    of_queries, of_keys = _in_blocks(of_queries, of_keys, group)

    def one(start):
        some = _part(of_queries, start, size)

        def add_keys(j, carry):
            out, total, top = carry
            out_new, total_new, top_new = _forward_block(*some, *_part(of_keys, j * BLOCK, BLOCK), window, cap)
            highest = jnp.maximum(top, top_new)
            old, new = jnp.exp(top - highest), jnp.exp(top_new - highest)
            return out * old + out_new * new, total * old + total_new * new, highest

        column = jnp.zeros((B, K, size, 1), jnp.float32)
        start_values = (jnp.zeros((B, K, size, H), jnp.float32), column, column + MASKED)
        return _softmax(*lax.fori_loop(*_key_blocks(some[-1], window), add_keys, start_values))

    outs, normalizers = lax.map(one, jnp.arange(0, of_queries[0].shape[2], size))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(B, K, -1, *x.shape[4:])[:, :, :Q]
    return join(outs), join(normalizers)


def _loop_backward(of_queries, of_keys, window, cap, group):
    (B, K, Q, H), S, size = of_queries[0].shape, of_keys[0].shape[2], BLOCK * group
    of_queries, of_keys = _in_blocks(of_queries, of_keys, group)

    def one(carry, start):
        some = _part(of_queries, start, size)

        def add_keys(j, carry):
            dq, *of_keys_before = carry
            dq_new, *new = _backward_block(*some, *_part(of_keys, j * BLOCK, BLOCK), window, cap)
            add = lambda x, new: lax.dynamic_update_slice_in_dim(x, _part(x, j * BLOCK, BLOCK) + new, j * BLOCK, axis=2)
            return dq + dq_new, *map(add, of_keys_before, new)

        start_values = (jnp.zeros((B, K, size, H), jnp.float32), *carry)
        dq, dk, dv = lax.fori_loop(*_key_blocks(some[-1], window), add_keys, start_values)
        return (dk, dv), dq

    empty = jnp.zeros(of_keys[0].shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (empty, empty), jnp.arange(0, of_queries[0].shape[2], size))
    return jnp.moveaxis(dq, 0, 2).reshape(B, K, -1, H)[:, :, :Q], dk[:, :, :S], dv[:, :, :S]
