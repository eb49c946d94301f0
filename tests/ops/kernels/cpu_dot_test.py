"""The native CPU kernels in every form that this processor runs, and the portable form, against float64 numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.ops.kernels.cpu import build
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.norm import Normed
from efflm.ops.packing import pack
from efflm.ops.qarray import QArray

FORMS = [form for form in build.FORMS if form in build.supported()]
ALL = (8, 4, 3, 2), ("float", "int8", "int8_static"), (True, False), (0, 32, 64)
WIDER = (7, "float", True, 32), (6, "int8", False, 64), (5, "float", False, 0)  # laid out as 8 bits
FORMATS = [dict(zip(("bits", "activations", "symmetric", "group"), one)) for one in (*itertools.product(*ALL), *WIDER)]
SCALES = "float16", "int8", "float32", "bfloat16", "int8"  # of the formats, in turn; int8: in super-blocks
SIZES = st.integers(1, 150)
# What a row of x is multiplied with, and what stands in the middle of it.
ROWS = {
    "usual": (1.0, None),
    "zeros": (0.0, None),
    "tiny": (1e-30, None),
    "huge": (1e30, None),
    "NaN": (1.0, np.nan),
    "infinity": (1.0, -np.inf),
}


@pytest.fixture(autouse=True, params=FORMS)
def form(request, native_kernels):
    with build.chosen(request.param):
        yield request.param


def drawn_rows(rng, kinds, K, dtype):
    x = rng.standard_normal((len(kinds), K)).astype(np.float32)
    for row, kind in zip(x, kinds):
        size, other = ROWS[kind]
        row *= size
        if other is not None:
            row[K // 2] = other
    return x.astype(dtype)


def drawn_weight(rng, K, N, transposed, bits=8, group=0, symmetric=True, activations="float", dtype="float16"):
    """A QArray of random codes, the least and the greatest above all, and scales of both signs, of dtype int8 in
    super-blocks of two groups; what it stands for: float64 [K, N]."""
    low, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    group = 0 if group >= K else group
    numbers = rng.choice([low, most], (K, N)) if rng.random() < 0.3 else rng.integers(low, most + 1, (K, N))
    groups = -(-K // group) if group else 1
    super_block = 2 * group if dtype == "int8" else 0
    stored = "float16" if dtype == "int8" else jnp.dtype(dtype)
    signed = lambda rows: (rng.uniform(0.01, 2, (rows, N)) * rng.choice([-1, 1], (rows, N))).astype(stored)
    whole = signed(-(-K // super_block)) if super_block else None
    scale = rng.integers(-127, 128, (groups, N)).astype(np.int8) if super_block else signed(groups)
    zeros = np.zeros((groups, N), np.int8) if symmetric else rng.integers(low, most + 1, (groups, N)).astype(np.int8)
    each = lambda part, group=group: np.repeat(part.astype(np.float64), group or K, axis=0)[:K]
    scales = each(scale) * (each(whole, super_block) if super_block else 1)
    turned = lambda part: jax.device_put(part.T if transposed else part)  # jnp.asarray would compile for each shape
    w = QArray(
        turned(pack(numbers.astype(np.int8), bits, axis=0)),
        turned(scale),
        None if symmetric else turned(pack(zeros, bits, axis=0) if super_block else zeros),
        jax.device_put(np.full((1, 1), 0.02, np.float32)) if activations == "int8_static" else None,
        None if whole is None else turned(whole),
        bits=bits,
        axis=-1 if transposed else -2,
        group=group,
        size=K,
        activations=activations,
        super_block=super_block,
    )
    return w, (numbers - each(zeros)) * scales, (np.abs(numbers) + np.abs(each(zeros))) * np.abs(scales)


def as_multiplied(x, w):
    """The rows of x in float64, rounded as w asks for it; NaN where the whole result must be."""
    x = np.asarray(x, np.float32)
    if getattr(w, "activations", "float") == "float":
        return np.float64(x)
    most = np.abs(x).max(-1, keepdims=True)
    step = np.where(most > 0, most / np.float32(127), 1) if w.activations == "int8" else np.float32(0.02)
    with np.errstate(invalid="ignore"):
        rounded = np.clip(np.rint(x / step), -127, 127).astype(np.float64) * step
    return np.where(np.isfinite(most), rounded, np.nan)


def require_close(got, x, w, matrix, sizes):
    """got [M, N] is x @ matrix to float32 rounding; sizes: of what is added up for each entry of the matrix."""
    got, x = np.float64(got), as_multiplied(x, w)
    good = np.isfinite(x).all(-1)
    error = np.abs(got[good] - x[good] @ matrix)
    assert np.all(error <= 1e-6 * (2 + len(matrix) / 50) * (np.abs(x[good]) @ sizes) + 1e-36)
    rounds = getattr(w, "activations", "float") != "float"
    assert np.all(np.isnan(got[~good]) if rounds else ~np.isfinite(got[~good]))


def product(x, w, transposed):
    return ops.unembed(x, w) if transposed else ops.dot(x, w)


def test_quantized_weights_of_every_format_against_float64(rng):
    """In one program. The numbers of rows are such that each kind of loop is taken, with and without a rest."""
    drawn, inputs = [], []
    for i, (format, dtype) in enumerate(zip(FORMATS, itertools.cycle(SCALES))):
        K, N = rng.integers(1, 150), rng.integers(1, 80)
        drawn.append(drawn_weight(rng, K, N, i % 2 == 1, **format, dtype=dtype))
        kinds = rng.choice(list(ROWS), [100, 17, 5][i % 3], p=[0.75, *[0.05] * 5])
        inputs.append(drawn_rows(rng, kinds, K, [jnp.float32, jnp.bfloat16][i % 4 // 2]))
    prepared = ops.prepare([w for w, *_ in drawn], "cpu")
    assert all(isinstance(panels, cpu.Panels) and panels.shape == w.shape for panels, (w, *_) in zip(prepared, drawn))
    multiply = lambda x, w: [product(some, w, w.axis == -1) for some in (x, x[:2], x[:1])]
    found = jax.jit(lambda inputs, weights: list(map(multiply, inputs, weights)))(inputs, prepared)
    for outs, x, (w, *wanted) in zip(found, inputs, drawn, strict=True):
        for out in outs:
            require_close(out, x[: len(out)], w, *wanted)


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=20), SIZES, SIZES, st.booleans(),
    st.sampled_from([(jnp.float32, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16)]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_dense_weights_against_float64(kinds, K, N, transposed, dtypes, seed):
    rng = np.random.default_rng(seed)
    x = drawn_rows(rng, kinds, K, dtypes[0])
    w = jax.device_put(rng.standard_normal((N, K) if transposed else (K, N)).astype(dtypes[1]))
    prepared = ops.prepare({"w": w}, "cpu")["w"]
    matrix = np.float64(w).T if transposed else np.float64(w)
    few = len(kinds) <= cpu.FEW_ROWS[str(w.dtype)]
    assert (cpu.dots(x, (prepared,), transposed=transposed) is not None) == few
    require_close(product(x, prepared, transposed), x, w, matrix, np.abs(matrix))


def test_bfloat16_rows_times_float32_weights_are_left_to_xla():
    x, w = jnp.ones((1, 8), jnp.bfloat16), jnp.full((8, 3), 1.001)
    prepared = ops.prepare({"w": w}, "cpu")["w"]
    assert cpu.dots(x, (prepared,)) is None
    np.testing.assert_array_equal(ops.dot(x, prepared), ops.dot(x, w))


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_panels_take_no_more_bytes_than_weights_are_stored_in(rng):
    for format in FORMATS:
        w, *_ = drawn_weight(rng, 96, 64, False, **format)
        assert trees.nbytes(ops.prepare(w, "cpu")) == trees.nbytes(
            w.replace(values=w.values if w.bits < 5 else ops.qarray.codes(w))
        )


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_weights_are_read_from_panels(rng):
    drawn = [drawn_weight(rng, 83, 45, i % 2 == 1, **format) for i, format in enumerate(FORMATS) if i % 3 == 0]
    tokens = np.array([[0, 44, 31], [32, 7, 7]])
    lookup = jax.jit(lambda weights, tokens: [ops.embed(w, tokens, jnp.float32) for w in weights])
    found = lookup(ops.prepare([w for w, *_ in drawn], "cpu"), jnp.asarray(tokens))
    for rows, (w, matrix, _) in zip(found, drawn, strict=True):
        table = matrix.T if w.axis == -1 else matrix
        np.testing.assert_allclose(rows, table[tokens], rtol=1e-6)


def test_sums_of_the_most_inputs_fit(rng):
    K = cpu.MOST_INPUTS
    w = QArray(
        jnp.full((K, 1), 127, jnp.int8), jnp.ones((1, 1)), jnp.full((1, 1), -128, jnp.int8), size=K, activations="int8"
    )
    out = ops.dot(jnp.asarray([[1.0], [-1.0]]) * jnp.ones((1, K)), ops.prepare({"w": w}, "cpu")["w"])
    np.testing.assert_allclose(out[:, 0], [255 * K, -255 * K], rtol=1e-6)
    assert not cpu.takes(w.replace(values=np.zeros((K + 1, 1), np.int8), size=K + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_several_weights_and_residual_in_one_call(dtype, biased, rng):
    K, N = 83, 45
    weights, matrices = zip(*[drawn_weight(rng, K, n, False, bits=bits)[:2] for n, bits in ((N, 8), (N, 4), (20, 8))])
    scale, bias = (jnp.asarray(rng.standard_normal(K), jnp.float32) for _ in range(2))
    rows = jnp.asarray(rng.standard_normal((3, K)) + 1, jnp.float32)
    x = Normed(rows, scale, bias if biased else None, 1e-5, dtype)
    residual = jnp.asarray(rng.standard_normal((3, N)), jnp.float32)
    prepared = [ops.prepare({"w": w}, "cpu")["w"] for w in weights]
    wide = np.float64(rows) - (np.float64(rows).mean(-1, keepdims=True) if biased else 0)
    wide = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5) * np.float64(scale)
    wide += np.float64(bias) if biased else 0
    off = 1e-5 if dtype == "float32" else 0.01
    for out, matrix in zip(ops.dots(x, prepared), matrices):
        np.testing.assert_allclose(out, wide @ matrix, atol=off * np.abs(wide @ matrix).max())
    text = jax.jit(ops.dots).lower(x, prepared).as_text()
    assert (text.count("@efflm_dots"), text.count("rsqrt")) == (1, 0)
    out = ops.dot(x, prepared[0], residual)
    np.testing.assert_allclose(out, wide @ matrices[0] + residual, atol=off * np.abs(wide @ matrices[0]).max())


def test_of_several_weights_each_takes_the_path_that_it_can(rng):
    x = jnp.asarray(rng.standard_normal((40, 12)), jnp.float32)
    w, matrix, _ = drawn_weight(rng, 12, 5, False)
    dense = jnp.asarray(rng.standard_normal((12, 5)), jnp.float32)
    prepared = ops.prepare({"a": w, "b": dense}, "cpu")
    for out, wanted in zip(ops.dots(x, (prepared["a"], prepared["b"])), (matrix, np.float64(dense))):
        np.testing.assert_allclose(out, np.float64(x) @ wanted, atol=1e-5 * np.abs(np.float64(x) @ wanted).max())


def test_leading_axes_vmap_and_no_rows(form, rng):
    w, matrix, _ = drawn_weight(rng, 24, 10, False)
    prepared = ops.prepare({"w": w}, "cpu")["w"]
    x = jnp.asarray(rng.standard_normal((2, 3, 24)), jnp.float32)
    for out in (ops.dot(x, prepared), jax.vmap(ops.dot, (0, None))(x, prepared)):
        np.testing.assert_allclose(out, np.float64(x) @ matrix, rtol=1e-4, atol=1e-3)
    assert ops.dot(x[:, :0], prepared).shape == (2, 0, 10)
    text = jax.jit(ops.dot).lower(x, prepared).as_text()
    assert build.target("efflm_dots", form) in text
