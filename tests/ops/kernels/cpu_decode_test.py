"""The kernels of a decoded token: attention over the cache, products of normed rows, the feed-forward part; and what
the compiled decode loop is made of."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops
from efflm.compress.quantize import quantize
from efflm.infer import generate
from efflm.infer.sampling import GREEDY
from efflm.model import empty_cache
from efflm.ops.kernels.cpu import build, decode
from tests import tiny

FORMS = build.supported()
pytestmark = pytest.mark.usefixtures("native_kernels")


def cached(B, S, N, K, H, rotated, dtype, seed, T=1):
    """The arguments of ops.cached_attention for T new tokens a sequence, at different positions."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    positions = jnp.asarray(rng.integers(0, S - T + 1, (B, 1)) + np.arange(T), jnp.int32)
    angles = normal(B, T, rotated // 2)
    cache = [normal(B, S, K, H).astype(dtype) for _ in range(2)]
    return (normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H), *cache, positions), (
        (jnp.cos(angles), jnp.sin(angles)) if rotated else None
    )


def reference(q, k, v, keys, values, positions, rotary, window):
    """float64 [B, T, N, H] and the caches, by the definition."""
    f64 = lambda x: np.asarray(x, np.float64)

    def turned(x):
        if rotary is None:
            return f64(x)
        cos, sin = (f64(part)[:, :, None] for part in rotary)
        half = cos.shape[-1]
        first, second, rest = np.split(f64(x), [half, 2 * half], axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    q, k, v, keys, values = turned(q), turned(k), f64(v), f64(keys).copy(), f64(values).copy()
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t in np.ndindex(positions.shape):
        position = int(positions[b, t])
        keys[b, position], values[b, position] = k[b, t], v[b, t]
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        for n in range(q.shape[2]):
            scores = keys[b, seen, n // group] @ q[b, t, n] * q.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ values[b, seen, n // group] / weights.sum()
    return out, keys, values


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 5, decode.FEW_TOKENS, decode.FEW_TOKENS + 1]),
    S=st.sampled_from([0, 37, 300, 700]),
    K=st.integers(1, 3),
    group=st.integers(1, 3),
    H=st.sampled_from([4, 17, 32, 64, 72]),
    share=st.sampled_from([0, 0.5, 1]),
    window=st.sampled_from([0, 1, 50, 400]),
    seed=st.integers(0, 9),
)
def test_cached_attention_is_the_definition(form, B, T, S, K, group, H, share, window, seed):
    arguments, rotary = cached(B, max(S, T), K * group, K, H, int(H * share) // 2 * 2, jnp.float32, seed, T)
    with build.chosen(form):
        found = ops.cached_attention(*arguments, rotary, dtype=jnp.float32, window=window)
    for ours, wanted in zip(found, reference(*arguments, rotary, window), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "T"), [(jnp.float32, 1), (jnp.bfloat16, 1), (jnp.bfloat16, 3)])
def test_cached_attention_in_bfloat16_rounds_as_the_portable_form_does(form, dtype, T):
    arguments, rotary = cached(2, 50, 4, 2, 32, 32, jnp.bfloat16, seed=0, T=T)
    with build.chosen("off"):
        wanted = ops.cached_attention(*arguments, rotary, dtype=dtype)
    with build.chosen(form):
        found = ops.cached_attention(*arguments, rotary, dtype=dtype)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=2**-7)  # a last place, rarely
    np.testing.assert_allclose(found[0], wanted[0], atol=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_positions_beyond_the_cache_are_moved_into_it_by_every_form(form, T):
    (*arrays, _), rotary = cached(4, 8, 4, 2, 16, 16, jnp.float32, seed=0, T=T)
    first = np.array([[8 - T], [9 - T], [30], [-2]])
    positions = jnp.asarray(first + np.arange(T), jnp.int32)
    inside = jnp.asarray(np.clip(first, 0, 8 - T) + np.arange(T), jnp.int32)
    with build.chosen("off"):
        found = ops.cached_attention(*arrays, positions, rotary, dtype=jnp.float32)
    with build.chosen(form):
        native = ops.cached_attention(*arrays, positions, rotary, dtype=jnp.float32)
    for ours, theirs, wanted in zip(native, found, reference(*arrays, inside, rotary, 0), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(theirs, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_in_its_sequence(form):
    arguments, rotary = cached(3, 40, 4, 2, 16, 16, jnp.float32, seed=1)
    with build.chosen(form):
        clean = ops.cached_attention(*arguments, rotary, dtype=jnp.float32)[0]
        spoiled = ops.cached_attention(arguments[0].at[1].set(jnp.nan), *arguments[1:], rotary, dtype=jnp.float32)[0]
    assert np.isnan(spoiled[1]).all()
    np.testing.assert_array_equal(spoiled[::2], clean[::2])


FORMATS = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "w8a8": lambda w: ops.quantize_array(w, -2, ops.Format(activations="int8")),
    "w4a16": lambda w: ops.quantize_array(w, -2, ops.Format(bits=4, group=16)),
    "w3a8": lambda w: ops.quantize_array(w, -2, ops.Format(activations="int8", bits=3, group=16, symmetric=False)),
    "w2a16": lambda w: ops.quantize_array(w, -2, ops.Format(bits=2, group=16)),
}


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_normed_rows_and_residuals_are_read_as_the_portable_forms_do(form, format, rows):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, residual, scale, bias = normal(1, rows, 40), normal(1, rows, 40), normal(40), normal(40)
    dtype = "bfloat16" if format == "bfloat16" else "float32"
    weights = [FORMATS[format](normal(*shape)) for shape in ((40, 56), (40, 56), (56, 40))]
    with build.chosen(form):
        gate, up, down = ops.prepare({"a": weights}, "cpu")["a"]

    def outs(gate, up, down):
        yield from ops.dots(ops.Normed(x, scale, epsilon=1e-5, dtype=dtype), (gate, up))
        yield ops.dot(ops.Normed(x, scale, bias, epsilon=1e-5, dtype=dtype), gate)
        yield ops.dot(normal(1, rows, 56).astype(dtype), down, residual)
        normed = ops.Normed(x, scale, dtype=dtype)
        yield ops.gated_feedforward(normed, gate, up, down, residual, dtype)
        yield ops.gated_feedforward(normed, gate, up, down, None, dtype, activation="gelu_tanh")

    # A last place of a norm can turn a rounding to int8 or bfloat16: one code of 127, or one unit in 256.
    tolerance = 2e-5 if format in ("float32", "w4a16", "w2a16") else 2e-2
    state = rng.bit_generator.state
    native = list(outs(gate, up, down))
    rng.bit_generator.state = state
    for ours, portable in zip(native, outs(*weights), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, portable, atol=tolerance * float(jnp.abs(portable).max()))


def decode_program(model, batch: int) -> str:
    """The compiled decode loop, for a cache of 64 positions."""
    tokens = tiny.tokens(model.config, batch, 16)
    how, keys, stops = GREEDY.arrays(), generate.row_keys(0, batch), np.zeros(0, np.int32)
    prefilled = jax.eval_shape(lambda: generate.prefill(model, tokens, np.full(batch, 16, np.int32), cache_length=64))
    state = jax.eval_shape(lambda logits, cache: generate.start(logits, cache, keys, how, stops), *prefilled)
    return generate.decode.lower(model, state, how, stops, np.int32(4), steps=4).compile().as_text()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_the_cache_is_updated_in_place(kernels, batch):
    model = tiny.model()
    with build.chosen(kernels):
        program = decode_program(ops.prepare(model, "cpu"), batch)
    caches = re.escape(f"f32[{batch},64,2,8]")
    assert re.search(rf"{caches}\S* (parameter|get-tuple-element)\(", program)
    assert not re.search(rf"= {caches}\S* (copy|scatter)\(", program)


def test_a_decoded_token_takes_four_kernels_a_layer():
    model = tiny.model()
    prepared = ops.prepare(model.replace(params=quantize(model.params, "int8")), "cpu")
    program = decode_program(prepared, 1)
    body = max(re.split(r"\n(?=%|ENTRY)", program), key=lambda computation: computation.count(" custom-call("))
    assert body.count(" custom-call(") == 4 * len(model.config.blocks) + 1
    assert "dot(" not in body


def test_a_model_that_is_not_used_takes_no_processor_time():
    model = ops.prepare(tiny.model(), "cpu")
    generate.generate(model, [[1, 2, 3]], 8)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.1


def test_a_few_tokens_read_at_once_take_as_few_kernels():
    model = ops.prepare(tiny.model(), "cpu")
    tokens, cache = tiny.tokens(model.config, 1, 4), empty_cache(model.config, 1, 64)
    program = jax.jit(lambda *given: generate.forward(*given, cache=cache)).lower(model, tokens).compile().as_text()
    assert program.count(" custom-call(") == 4 * len(model.config.blocks) + 1
    assert "dot(" not in program
