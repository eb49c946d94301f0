"""The portable form against float64 loops over every query; gradients against those of a plain float64 softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.ops import attention_blocks
from efflm.ops.kernels.cpu import build


def visible(T, S, slots, segments, window):
    """[B, T, S], written out from the words of the docstring."""
    B = len(slots)
    seen = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        own = slots[b, t]
        seen[b, t, s] = s <= own and (not window or s > own - window)
        if segments is not None:
            seen[b, t, s] &= segments[b, s] == segments[b, t]
    return seen


def reference(q, k, v, seen, g, cap=0.0):
    """Output and the gradients of sum(output * g), float64, query by query."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out, dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, t, n in np.ndindex(B, T, N):
        keys, values = k[b, :, n // group], v[b, :, n // group]
        scores, slope = keys @ q[b, t, n] / np.sqrt(H), 1.0
        if cap:
            scores, slope = cap * np.tanh(scores / cap), np.cosh(scores / cap) ** -2
        p = np.exp(scores - scores[seen[b, t]].max()) * seen[b, t]
        p /= p.sum()
        out[b, t, n] = p @ values
        dp = values @ g[b, t, n]
        ds = p * (dp - p @ dp) * slope / np.sqrt(H)
        dq[b, t, n] = ds @ keys
        dk[b, :, n // group] += np.outer(ds, q[b, t, n])
        dv[b, :, n // group] += np.outer(p, g[b, t, n])
    return out, dq, dk, dv


@pytest.fixture(autouse=True)
def portable():
    with build.chosen("off"):
        yield


@pytest.fixture(params=["unrolled", "loops"])
def form(request, monkeypatch):
    """Both ways through the blocks, on arrays small enough for the reference."""
    if request.param == "loops":
        monkeypatch.setattr(attention_blocks, "UNROLLED", 1)
        monkeypatch.setattr(attention_blocks, "BLOCK", 8)
    return request.param


def draw(rng, B, T, S, N, K, H=8):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def with_gradients(q, k, v, g, **inputs):
    """The output and the gradients of sum(output * g), from one program, which is compiled anew for each call."""

    def run(q, k, v, g):
        out, pull = jax.vjp(lambda *a: ops.attention(*a, **inputs), q, k, v)
        return out, *pull(g)

    return jax.jit(run)(q, k, v, g)


def compare(q, k, v, g, seen, cap=0.0, **inputs):
    results = with_gradients(q, k, v, g, cap=cap, **inputs)
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)), seen, g.astype(np.float64), cap)
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (5, 0.0), (5, 0.8)])
def test_packed_rows_and_their_gradients(rng, form, N, K, window, cap):
    B, T = 2, 21
    q, k, v, g = draw(rng, B, T, T, N, K)
    segments = np.sort(rng.integers(0, 4, (B, T))).astype(np.int32)
    slots = np.tile(np.arange(T), (B, 1))
    seen = visible(T, T, slots, segments, window)
    compare(q, k, v, g, seen, cap, segments_BT=jnp.asarray(segments), window=window)


def test_plain_rows_longer_than_a_span(rng, form):
    q, k, v, g = draw(rng, 1, 150, 150, 2, 2)
    compare(q, k, v, g, visible(150, 150, np.arange(150)[None], None, 0))
    compare(q, k, v, g, visible(150, 150, np.arange(150)[None], None, 70), window=70)


@pytest.mark.parametrize("window", [0, 4])
def test_a_cache_with_rows_of_different_lengths(rng, form, window):
    B, T, S = 2, 5, 19
    q, k, v, g = draw(rng, B, T, S, 4, 2)
    slots = np.asarray([[3, 4, 5, 6, 7], [12, 13, 14, 15, 16]], np.int32)
    compare(q, k, v, g, visible(T, S, slots, None, window), slots_BT=jnp.asarray(slots), window=window)


def test_long_rows_hold_no_square_of_their_length():
    B, T, N, H = 1, 8192, 1, 16
    shape = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    both = lambda q, k, v: jax.vjp(ops.attention, q, k, v)[1](q)
    memory = jax.jit(both).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * T * 4 / 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_float32_softmax_and_sums(rng, form, dtype):
    q, k, v, g = (jnp.asarray(x, dtype) for x in draw(rng, 1, 40, 40, 2, 2))
    seen = visible(40, 40, np.arange(40)[None], None, 0)
    results = with_gradients(q, k, v, g.astype(jnp.float32))
    assert results[0].dtype == jnp.float32
    expected = reference(*(np.asarray(x, np.float64) for x in (q, k, v)), seen, np.asarray(g, np.float64))
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)


@pytest.mark.parametrize("window", [0, 6])
def test_some_queries_of_a_packed_row_see_its_keys(rng, form, window):
    """A device's own stretches, one from the front and one from the back, against the keys of all."""
    S, mine = 40, np.r_[5:10, 30:35]
    q, k, v, g = draw(rng, 2, len(mine), S, 4, 2)
    segments = np.sort(rng.integers(0, 3, (2, S))).astype(np.int32)
    whole = visible(S, S, np.tile(np.arange(S), (2, 1)), segments, window)
    where = {"slots_BT": mine[None].astype(np.int32), "segments_BT": segments[:, mine], "key_segments_BS": segments}
    compare(q, k, v, g, whole[:, mine], window=window, **where)
