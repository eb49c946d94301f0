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

MASKED = -1e30  # the score of a key that a query may not see: finite, so that a wholly masked block stays finite too
UNROLLED = 1024  # sequences up to this long are cut into a few blocks written out one by one, each with its own keys
BLOCK = 512  # queries and keys in a block of the loops beyond that


@flax.struct.dataclass
class _Placement:
    """The slots and the segments (or None) of queries or keys, int32 [B or 1, queries or keys]."""

    slots: jax.Array
    segments: jax.Array | None

    def part(self, start: Any, size: int) -> "_Placement":
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), self)


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


def attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, *, slots_BT, window: int) -> jax.Array:
    """See ops.attention; key_segments_BS are given where segments_BT are."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    group, in_order = N // K, slots_BT is None
    per_query = lambda x_BT: None if x_BT is None else jnp.repeat(x_BT, group, axis=1)
    order = jnp.arange(S, dtype=jnp.int32)[None]
    queries = _Placement(per_query(order[:, S - T :] if in_order else slots_BT), per_query(segments_BT))
    q_BKQH = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    out_BKQH = _attend(q_BKQH, k_BKSH, v_BKSH, queries, _Placement(order, key_segments_BS), window, group, in_order)
    return out_BKQH.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


# --- matmuls and masks of one block ---------------------------------------------------------------------------------


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """[B, K, M, X] @ [B, K, X, N] -> float32 [B, K, M, N]."""
    return lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _matmul_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """[B, K, M, X] @ [B, K, N, X]^T -> float32 [B, K, M, N]."""
    return lax.dot_general(a, b, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _masked(first: _Placement, second: _Placement, window: int, queries_first: bool) -> jax.Array:
    """True where a query may not see a key, [B or 1, 1, first, second]."""
    down, across = lambda x: x[:, None, :, None], lambda x: x[:, None, None, :]
    query, key = (down(first.slots), across(second.slots))
    if not queries_first:
        query, key = across(second.slots), down(first.slots)
    masked = key > query
    if window:
        masked = masked | (key <= query - window)
    if first.segments is not None:
        masked = masked | (down(first.segments) != across(second.segments))
    return masked


def _forward_block(q, k, v, queries: _Placement, keys: _Placement, window: int):
    """Of some queries and some keys: the sum of exp(score - top) v, of exp(score - top), and top; float32."""
    scores_BKQS = _matmul_transposed(q, k) * q.shape[-1] ** -0.5
    scores_BKQS = jnp.where(_masked(queries, keys, window, True), MASKED, scores_BKQS)
    top = jnp.max(scores_BKQS, axis=-1, keepdims=True)
    weights_BKQS = jnp.exp(scores_BKQS - top)
    return _matmul(weights_BKQS.astype(v.dtype), v), jnp.sum(weights_BKQS, axis=-1, keepdims=True), top


def _softmax(out, total, top):
    """The sums of `_forward_block` as attention, and the log-normalizers [B, K, Q]. Both are 0 for a query that sees no
    key: in the backward pass the weights of masked keys are then 0."""
    blind = (top <= MASKED / 2) & ~jnp.isnan(total)
    return jnp.where(blind, 0.0, out / total), jnp.where(blind, 0.0, top + jnp.log(total))[..., 0]


def _backward_block(q, k, v, g, normalizer, inner, queries: _Placement, keys: _Placement, window: int):
    """The float32 gradients of some queries, keys and values through each other.

    g is the gradient of the output in the compute dtype; normalizer and inner = sum(g * output) are [B, K, Q].
    """
    scale = q.shape[-1] ** -0.5
    scores_BKSQ = jnp.where(_masked(keys, queries, window, False), MASKED, _matmul_transposed(k, q) * scale)
    weights_BKSQ = jnp.exp(scores_BKSQ - normalizer[:, :, None, :])
    from_weights = _matmul_transposed(v, g)
    ds_BKSQ = (weights_BKSQ * (from_weights - inner[:, :, None, :]) * scale).astype(q.dtype)
    return _matmul(transposed(ds_BKSQ), k), _matmul(ds_BKSQ, q), _matmul(weights_BKSQ.astype(q.dtype), g)


# --- all blocks, one after another -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, queries: _Placement, keys: _Placement, window: int, group: int, in_order: bool):
    return _attend_forward(q, k, v, queries, keys, window, group, in_order)[0]


def _attend_forward(q, k, v, queries, keys, window, group, in_order):
    T, S = q.shape[2] // group, k.shape[2]
    if unrolled(T, S):
        outs, normalizers = [], []
        for q_lo, q_hi, k_lo, k_hi in spans(T, S, window, in_order):
            some, block = slice(q_lo * group, q_hi * group), queries.part(q_lo * group, (q_hi - q_lo) * group)
            seen = keys.part(k_lo, k_hi - k_lo)
            out, total, top = _forward_block(q[:, :, some], k[:, :, k_lo:k_hi], v[:, :, k_lo:k_hi], block, seen, window)
            out, normalizer = _softmax(out, total, top)
            outs.append(out)
            normalizers.append(normalizer)
        out, normalizer = jnp.concatenate(outs, axis=2), jnp.concatenate(normalizers, axis=2)
    else:
        out, normalizer = _loop_forward(q, k, v, queries, keys, window, group)
    return out, (q, k, v, queries, keys, out, normalizer)


def _attend_backward(window, group, in_order, residuals, g):
    q, k, v, queries, keys, out, normalizer = residuals
    T, S = q.shape[2] // group, k.shape[2]
    q = late(q, g)
    inner, g = jnp.sum(g * out, axis=-1), g.astype(q.dtype)
    if unrolled(T, S):
        dqs, dk, dv = [], 0.0, 0.0
        for q_lo, q_hi, k_lo, k_hi in spans(T, S, window, in_order):
            some, block = slice(q_lo * group, q_hi * group), queries.part(q_lo * group, (q_hi - q_lo) * group)
            whole = lambda x, lo=k_lo, hi=k_hi: jnp.pad(x, ((0, 0), (0, 0), (lo, S - hi), (0, 0)))
            dq, dk_part, dv_part = _backward_block(
                q[:, :, some], k[:, :, k_lo:k_hi], v[:, :, k_lo:k_hi], g[:, :, some], normalizer[:, :, some],
                inner[:, :, some], block, keys.part(k_lo, k_hi - k_lo), window,
            )  # fmt: skip
            dqs.append(dq)
            dk, dv = whole(dk_part) + dk, whole(dv_part) + dv
        dq = jnp.concatenate(dqs, axis=2)
    else:
        dq, dk, dv = _loop_backward(q, k, v, g, normalizer, inner, queries, keys, window, group)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _grid(q, k, queries: _Placement, keys: _Placement, window: int, group: int):
    """Pad queries and keys to whole blocks: the functions that pad, what they sit at, and each block's range of keys.

    Padded queries repeat the last one's place and get gradient zero; padded keys lie beyond every slot.
    """
    size = BLOCK * group
    fill = lambda x, axis, unit: [(0, -x.shape[axis] % unit) if i == axis else (0, 0) for i in range(x.ndim)]
    pad_q, pad_k = lambda x: jnp.pad(x, fill(x, 2, size)), lambda x: jnp.pad(x, fill(x, 2, BLOCK))
    queries = jax.tree.map(lambda x: jnp.pad(x, fill(x, 1, size), mode="edge"), queries)
    total = k.shape[2] + -k.shape[2] % BLOCK
    segments = keys.segments if keys.segments is None else jnp.pad(keys.segments, fill(keys.segments, 1, BLOCK))
    keys = _Placement(jnp.arange(total, dtype=jnp.int32)[None], segments)

    def key_blocks(block: _Placement):
        first = jnp.maximum(jnp.min(block.slots) - window + 1, 0) // BLOCK if window else 0
        return first, jnp.max(block.slots) // BLOCK + 1

    return pad_q, pad_k, queries, keys, key_blocks, size


def _loop_forward(q, k, v, queries, keys, window, group):
    B, K, Q, H = q.shape
    pad_q, pad_k, queries, keys, key_blocks, size = _grid(q, k, queries, keys, window, group)
    q, k, v = pad_q(q), pad_k(k), pad_k(v)

    def one(start):
        block, q_block = queries.part(start, size), lax.dynamic_slice_in_dim(q, start, size, axis=2)

        def add_keys(j, carry):
            out, total, top = carry
            part = lambda x: lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, axis=2)
            seen = keys.part(j * BLOCK, BLOCK)
            out_new, total_new, top_new = _forward_block(q_block, part(k), part(v), block, seen, window)
            highest = jnp.maximum(top, top_new)
            old, new = jnp.exp(top - highest), jnp.exp(top_new - highest)
            return out * old + out_new * new, total * old + total_new * new, highest

        column = jnp.zeros((B, K, size, 1), jnp.float32)
        start_values = (jnp.zeros((B, K, size, H), jnp.float32), column, column + MASKED)
        out, total, top = lax.fori_loop(*key_blocks(block), add_keys, start_values)
        return _softmax(out, total, top)

    outs, normalizers = lax.map(one, jnp.arange(0, q.shape[2], size))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(B, K, -1, *x.shape[4:])[:, :, :Q]
    return join(outs), join(normalizers)


def _loop_backward(q, k, v, g, normalizer, inner, queries, keys, window, group):
    B, K, Q, H = q.shape
    S = k.shape[2]
    pad_q, pad_k, queries, keys, key_blocks, size = _grid(q, k, queries, keys, window, group)
    q, k, v, g, normalizer, inner = pad_q(q), pad_k(k), pad_k(v), pad_q(g), pad_q(normalizer), pad_q(inner)

    def one(carry, start):
        block = queries.part(start, size)
        of_queries = [lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (q, g, normalizer, inner)]
        q_block, g_block, normalizer_block, inner_block = of_queries

        def add_keys(j, carry):
            dq, dk, dv = carry
            part = lambda x: lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, axis=2)
            dq_new, dk_new, dv_new = _backward_block(
                q_block, part(k), part(v), g_block, normalizer_block, inner_block, block,
                keys.part(j * BLOCK, BLOCK), window,
            )  # fmt: skip
            add = lambda x, new: lax.dynamic_update_slice_in_dim(x, part(x) + new, j * BLOCK, axis=2)
            return dq + dq_new, add(dk, dk_new), add(dv, dv_new)

        dq, dk, dv = lax.fori_loop(*key_blocks(block), add_keys, (jnp.zeros((B, K, size, H), jnp.float32), *carry))
        return (dk, dv), dq

    empty = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (empty, empty), jnp.arange(0, q.shape[2], size))
    return jnp.moveaxis(dq, 0, 2).reshape(B, K, -1, H)[:, :, :Q], dk[:, :, :S], dv[:, :, :S]
