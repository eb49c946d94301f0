import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.ops import lowrank
from efflm.ops.lowrank import LowRank

K, N, R = 24, 16, 3
FORMATS = {
    "float": None,
    "int8": {"bits": 8},
    "w8a8": {"bits": 8, "activations": "int8"},
    "int4": {"bits": 4, "group": 8},
    "int3": {"bits": 3, "group": 8, "symmetric": False},
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight(name, seed=0):
    w = jnp.asarray(numbers(K, N, seed=seed))
    base = w if FORMATS[name] is None else ops.quantize_array(w, -2, ops.Format(**FORMATS[name]))
    return LowRank(base, jnp.asarray(numbers(K, R, seed=seed + 1)), jnp.asarray(numbers(R, N, seed=seed + 2)))


def dense(w):
    return np.float64(ops.dequantize(w.base)) + np.float64(w.a) @ np.float64(w.b)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_whole_matrix(name):
    w, x, residual = weight(name), numbers(2, 5, K, seed=7), numbers(2, 5, N, seed=8)
    got = ops.dot(jnp.asarray(x), w, jnp.asarray(residual))
    want = np.float64(x) @ dense(w) + residual
    if name == "w8a8":  # the base rounds what it reads
        want += np.float64(ops.dot(jnp.asarray(x), w.base)) - np.float64(x) @ np.float64(ops.dequantize(w.base))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ops.dequantize(w), dense(w), rtol=1e-5, atol=1e-5)
    plain = jnp.asarray(numbers(K, 8, seed=9))
    first, second = ops.dots(jnp.asarray(x), [w, plain])
    np.testing.assert_allclose(first + residual, got, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, np.float64(x) @ np.float64(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_whole_matrix_and_the_base_has_none(name):
    w, x, g = weight(name), numbers(5, K, seed=7), numbers(5, N, seed=8)
    loss = lambda x, a, b: jnp.sum(ops.dot(x, w.replace(a=a, b=b)) * g)
    dx, da, db = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(jnp.asarray(x), w.a, w.b)
    x, g, a, b = (np.float64(each) for each in (x, g, w.a, w.b))
    np.testing.assert_allclose(dx, g @ dense(w).T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(da, x.T @ (g @ b.T), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(db, (x @ a).T @ g, rtol=1e-4, atol=1e-3)
    if name == "float":
        of_base = jax.grad(lambda base: jnp.sum(ops.dot(jnp.float32(x), w.replace(base=base)) * g))(w.base)
        assert not np.any(of_base)


def test_slices_masks_and_merging():
    w = weight("float")
    rows, columns = jnp.array([3, 0, 7]), jnp.array([5, 1])
    small = ops.take(ops.take(w, 0, rows), 1, columns)
    np.testing.assert_allclose(ops.dequantize(small), dense(w)[np.ix_(rows, columns)], rtol=1e-5)
    mask = numbers(K, N, seed=3) > 0
    assert not np.any(np.asarray(ops.apply_masks({"w": w}, {"w": jnp.asarray(mask)})["w"].base)[~mask])
    four = weight("int4")
    merged = ops.requantize(ops.dequantize(four), four)
    assert (merged.bits, merged.group, merged.shape) == (4, 8, (K, N))
    apart, pairs = lowrank.split({"w": four, "v": w.a})
    assert apart["w"] is four.base
    assert lowrank.join(apart, pairs)["w"].a is four.a
    assert trees.count({"w": four}) == K * N
    assert ops.stored_nbytes({"w": four}) == ops.stored_nbytes({"w": four.base}) + 4 * R * (K + N)


def test_training_never_holds_the_floats_of_all_layers():
    """The forward pass of a layer makes those of its base, the backward pass makes them again."""
    size, layers, rank = 256, 12, 2
    base = jax.eval_shape(lambda: ops.quantize_array(jnp.ones((size, size)), -2, ops.Format(bits=4, group=32)))
    thin = jax.ShapeDtypeStruct((size, rank), jnp.float32), jax.ShapeDtypeStruct((rank, size), jnp.float32)

    def loss(trainable, bases, x):
        for (a, b), w in zip(trainable, bases, strict=True):
            x = jnp.tanh(ops.dot(x, ops.LowRank(w, a, b)))
        return jnp.sum(x)

    rows = jax.ShapeDtypeStruct((4, size), jnp.float32)
    program = jax.jit(jax.grad(loss)).lower([thin] * layers, [base] * layers, rows).compile()
    assert program.memory_analysis().temp_size_in_bytes < layers * size * size * 4 / 4
