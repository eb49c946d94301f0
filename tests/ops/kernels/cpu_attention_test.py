"""The native kernel against float64 numpy, in every form that this processor runs."""

import functools
import hashlib
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efflm import ops
from efflm.ops import attention_blocks
from efflm.ops.attention import kernel_for
from efflm.ops.kernels import Attention
from efflm.ops.kernels.cpu import attention as cpu
from efflm.ops.kernels.cpu import build

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.fixture(params=build.supported(), autouse=True, scope="module")
def form(request):
    with build.chosen(request.param):
        yield request.param


def visible(T, S, slots, segments, key_segments, window):
    """[B, T, S]: whether a query may see a key."""
    query, key = slots[:, :, None], np.arange(S)[None, None]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    if segments is not None:
        seen = seen & (segments[:, :, None] == key_segments[:, None])
    return seen


def reference(q, k, v, g, seen):
    """Output and gradients of sum(output * g), float64; 0 where a query sees no key."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    q, g = (x.reshape(B, T, K, N // K, H) for x in (q, g))
    seen = np.broadcast_to(seen, (B, T, S))[:, None, None]
    scores = np.where(seen, np.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(H), -np.inf)
    p = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300)) * seen
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bkgts,bskh->btkgh", p, v)
    dp = np.einsum("btkgh,bskh->bkgts", g, v)
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) / np.sqrt(H)
    dq, dk = np.einsum("bkgts,bskh->btkgh", ds, k), np.einsum("bkgts,btkgh->bskh", ds, q)
    return out.reshape(B, T, N, H), dq.reshape(B, T, N, H), dk, np.einsum("bkgts,btkgh->bskh", p, g)


def draw(rng, B, T, S, N, K, H, dtype=jnp.float32):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    *arrays, g = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return *arrays, g.astype(jnp.float32)


def with_gradients(q, k, v, g, **where):
    out, pull = jax.vjp(functools.partial(ops.attention, **where), q, k, v)
    return out, *pull(g)


def compiled_anew():
    """JAX knows a function by its identity, and not the form of the kernels that it was compiled with."""
    return jax.jit(lambda *arrays: with_gradients(*arrays))


def assert_close(got, want, dtype):
    assert [x.dtype for x in got] == [jnp.float32, *[dtype] * 3]
    for a, b in zip(got, want, strict=True):
        # Gradients are rounded to the compute dtype, and nothing else is.
        low = dtype == jnp.bfloat16 and a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8 if low else 2e-4, atol=3e-5)


@hypothesis.settings(
    max_examples=5, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)  # shrinking would compile for minutes
@hypothesis.given(
    st.tuples(st.integers(2, 230), st.integers(0, 90)),
    st.integers(1, 2),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.integers(1, 75),
    st.sampled_from([0, 1, 30, 150]),
    st.sampled_from([(), ("segments",), ("slots",), ("slots", "segments")]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.integers(0, 9),
)
@hypothesis.example((200, 0), 1, (1, 2), 64, 0, (), jnp.float32, 0)
@hypothesis.example((130, 9), 1, (1, 1), 16, 30, (), jnp.float32, 0)
@hypothesis.example((150, 61), 2, (2, 1), 33, 100, ("slots", "segments"), jnp.bfloat16, 0)
def test_output_and_gradients(lengths, B, heads, H, window, given, dtype, seed):
    (T, more), (K, group), rng = lengths, heads, np.random.default_rng(seed)
    S = T + more
    q, k, v, g = draw(rng, B, T, S, K * group, K, H, dtype)
    slots, segments, keys, where = np.tile(np.arange(more, S), (B, 1)), None, None, {"window": window}
    if "slots" in given:
        slots = rng.integers(0, S, (B, T))
        where["slots_BT"] = jnp.asarray(slots, jnp.int32)
    if "segments" in given:
        keys = np.sort(rng.integers(0, 4, (B, S)), axis=1)
        segments = np.take_along_axis(keys, slots, axis=1)
        where |= {"segments_BT": jnp.asarray(segments, jnp.int32), "key_segments_BS": jnp.asarray(keys, jnp.int32)}
    assert "efflm_attention_backward" in str(jax.make_jaxpr(functools.partial(with_gradients, **where))(q, k, v, g))
    got = jax.jit(functools.partial(with_gradients, **where))(q, k, v, g)
    assert_close(got, reference(q, k, v, g, visible(T, S, slots, segments, keys, window)), dtype)


@pytest.mark.parametrize("kernels", ["native", "portable", "portable, looped"])
def test_queries_that_see_no_key_get_zero(rng, form, monkeypatch, kernels):
    q, k, v, g = draw(rng, 1, 40, 40, 2, 1, 16)
    segments, keys = np.arange(40)[None] // 10, np.zeros((1, 40), int)
    where = {"segments_BT": jnp.asarray(segments, jnp.int32), "key_segments_BS": jnp.asarray(keys, jnp.int32)}
    if kernels == "portable, looped":
        monkeypatch.setattr(attention_blocks, "UNROLLED", 0)
    with build.chosen(form if kernels == "native" else "off"):
        got = jax.jit(functools.partial(with_gradients, **where))(q, k, v, g)
    want = reference(q, k, v, g, visible(40, 40, np.arange(40)[None], segments, keys, 0))
    assert_close(got, want, jnp.float32)
    assert not np.any(got[0][:, 10:])
    if kernels != "native":
        with build.chosen("off"):  # what is not finite is not taken for a query without keys
            assert np.isnan(with_gradients(q.at[0, 5].set(jnp.nan), k, v, g, **where)[0][0, 5]).all()


def test_large_scores_and_far_keys(rng):
    """Weights that round to 0 are 0, and do not overflow where scores grow from block to block."""
    q, k, v, g = draw(rng, 1, 260, 260, 1, 1, 8)
    q, k = jnp.abs(q) * 10, jnp.abs(k) * jnp.linspace(1, 30, 260)[None, :, None, None]
    got = compiled_anew()(q, k, v, g)
    want = reference(q, k, v, g, visible(260, 260, np.arange(260)[None], None, None, 0))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_nan_stays_where_it_is_seen(rng):
    q, k, v, g = draw(rng, 2, 130, 130, 4, 2, 16)
    run = compiled_anew()
    broken = lambda x: np.isnan(np.asarray(x))
    out, *gradients = run(q.at[0, 50, 1].set(jnp.nan), k, v, g)
    where = np.zeros((2, 130, 4), bool)
    where[0, 50, 1] = True
    np.testing.assert_array_equal(broken(out).all(-1), where)
    np.testing.assert_array_equal(broken(out).any(-1), where)
    of_head = (slice(0, 1), slice(None), slice(0, 1))
    for gradient in gradients[1:]:
        assert broken(gradient[0, :51, 0]).all()
        assert not broken(gradient[1]).any()
        assert not broken(gradient[:, :, 1]).any()
    out = run(q, k.at[0, 50, 0].set(jnp.nan), v, g)[0]
    where[:] = False
    where[0, 50:, :2] = True
    np.testing.assert_array_equal(broken(out).any(-1), where)
    assert not broken(run(q, k, v.at[of_head].set(jnp.nan), g)[0])[:, :, 2:].any()


def test_rematerialized_and_mapped(rng):
    B, T, H = 2, 70, 24
    q, k, v, g = draw(rng, B, T, T, 2, 2, H)
    scaled = lambda q, k, v: ops.attention(jnp.tanh(q), k, v)
    gradients = lambda fn: jax.jit(lambda *arrays: jax.vjp(fn, *arrays)[1](g))
    for got, want in zip(gradients(jax.checkpoint(scaled))(q, k, v), gradients(scaled)(q, k, v), strict=True):
        np.testing.assert_array_equal(got, want)
    one = lambda *arrays: with_gradients(*(x[None] for x in arrays))
    mapped = jax.jit(jax.vmap(one))(q, k, v, g)
    for got, want in zip(mapped, compiled_anew()(q, k, v, g), strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)


def test_nothing_as_large_as_the_scores_is_held():
    B, T, N, H = 1, 4096, 2, 16
    shape = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    memory = compiled_anew().lower(shape, shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * T * 4 / 8


def test_what_the_kernel_takes(form):
    takes = lambda queries, dtype, in_order=True: kernel_for("cpu", Attention(queries, 64, 16, dtype, 0, in_order))
    assert takes(64, jnp.float32) is takes(2, jnp.bfloat16, False) is cpu.attention
    assert takes(64, jnp.float16) is takes(1, jnp.float32) is None
    with build.chosen("off"):
        assert takes(64, jnp.float32) is None


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.ops.kernels import cpu_attention_test as module
print(module.digest(sys.argv[1]))
"""


def digest(form):
    """Of what every kernel computes."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    arrays = draw(rng, 1, 300, 300, 4, 2, 32)
    q, k, v = draw(rng, 1, 1, 1, 8, 4, 32)[:3]
    cached = (q, k, v, normal(1, 900, 4, 32), normal(1, 900, 4, 32), jnp.full((1, 1), 899), None)
    w = [normal(*shape) for shape in ((200, 300), (200, 300), (300, 200))]
    codes = [ops.quantize_array(each, -2, ops.Format(activations="int8")) for each in w]
    with build.chosen(form):
        got = list(compiled_anew()(*arrays))
        got += ops.cached_attention(*cached, dtype=jnp.float32)
        for some in (w, codes):
            gate, up, down = ops.prepare({"w": some}, "cpu")["w"]
            for x in (normal(1, 200), normal(9, 200)):
                got += ops.dots(x, (gate, up))
                got.append(ops.gated_feedforward(x, gate, up, down, x, jnp.float32))
        table = ops.prepare({"w": normal(500, 200)}, "cpu")["w"]
        got.append(ops.unembed(normal(1, 200), table))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in got)).hexdigest()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be kept to one core here")
def test_results_are_the_same_with_any_number_of_threads(form):
    if form != build.supported()[0]:
        pytest.skip("the tasks are those of the best form")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ONE_CORE, form], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == digest(form), done.stderr
