"""Against float64 numpy, gradients included; memory and the shapes in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from tests.programs import largest_array


def reference(x, w, targets, weights, z, cap=0.0):
    """The two sums and the gradients of the first, float64; w is [D, V]."""
    logits, of_cap = capped(x @ w, cap)
    normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = np.exp(logits - normalizer[..., None])
    hit = np.eye(w.shape[1])[targets]
    slope = weights[..., None] * (p * (1 + 2 * z * normalizer[..., None]) - hit) * of_cap
    total = (weights * (nll + z * normalizer**2)).sum()
    return total, (weights * nll).sum(), slope @ w.T, np.einsum("btd,btv->dv", x, slope)


def capped(logits, cap):
    """Logits with a soft cap, and the derivative of it."""
    return (cap * np.tanh(logits / cap), np.cosh(logits / cap) ** -2.0) if cap else (logits, 1.0)


def pulled(fn, *arrays, by):
    """fn(*arrays), and the gradients of its results, each times a number of `by`; one program."""

    def run(*arrays):
        values, pull = jax.vjp(fn, *arrays)
        return values, pull(tuple(map(jnp.float32, by)))

    return jax.jit(run)(*arrays)


def draw(rng, B, T, D, V):
    x, w = rng.standard_normal((B, T, D)), rng.standard_normal((D, V)) * 0.5
    return x, w, rng.integers(0, V, (B, T)), rng.random((B, T)) * (rng.random((B, T)) < 0.8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("z", "cap"), [(0.0, 0.0), (0.01, 0.0), (0.01, 1.5)])
@pytest.mark.parametrize(("B", "T"), [(2, 5), (3, 700), (1, 1)])
def test_sums_and_gradients_equal_float64(rng, tied, z, cap, B, T):
    x, w, targets, weights = draw(rng, B, T, 16, 37)
    total, nll, dx, dw = reference(x, w, targets, weights, z, cap)
    stored = jnp.asarray(w.T if tied else w, jnp.float32)

    @jax.jit
    def loss(x, w):
        return ops.cross_entropy(x, w, jnp.asarray(targets), jnp.asarray(weights), tied=tied, cap=cap, z_weight=z)

    (got, got_nll), (got_dx, got_dw) = pulled(loss, jnp.asarray(x, jnp.float32), stored, by=(3, 7))
    np.testing.assert_allclose([got, got_nll], [total, nll], rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.asarray(x, jnp.float32), stored)[0], total, rtol=1e-5)
    # no gradient flows from the second sum
    np.testing.assert_allclose(got_dx, 3 * dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_dw.T if tied else got_dw, 3 * dw, rtol=1e-4, atol=1e-4)


def test_bfloat16_operands_keep_float32_sums(rng):
    x, w, targets, weights = draw(rng, 4, 300, 32, 64)
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (x, w))
    exact = reference(np.asarray(x, np.float64), np.asarray(w, np.float64), targets, weights, 0.0)
    loss = lambda x, w: ops.cross_entropy(x, w, targets, weights, tied=False)
    (total, _), gradients = pulled(loss, x, w, by=(1, 0))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, exact[0], rtol=1e-5)
    for got, want in zip(gradients, exact[2:], strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.05, atol=0.03 * np.abs(want).max())


def plain(x_BTD, w, targets_BT):
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT)


def chunked(x_BTD, w, targets_BT):
    weights = jnp.ones(targets_BT.shape, jnp.float32)
    return ops.cross_entropy(x_BTD, w, targets_BT, weights, tied=True)[0] / targets_BT.size


def test_a_large_vocabulary_takes_a_tenth_of_the_memory():
    x, w = jax.ShapeDtypeStruct((16, 512, 64), jnp.float32), jax.ShapeDtypeStruct((49152, 64), jnp.float32)
    targets = jax.ShapeDtypeStruct((16, 512), jnp.int32)
    compiled = [jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, w, targets).compile() for f in (plain, chunked)]
    before, after = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert before > 10 * after
    assert largest_array(compiled[0]) == 16 * 512 * 49152
    assert largest_array(compiled[1]) <= 16 * 512 * 49152 // 16


def test_a_large_vocabulary_gives_the_same_loss_and_gradients(rng):
    x = jnp.asarray(rng.standard_normal((4, 256, 32)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((49152, 32)) * 0.2, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 49152, (4, 256)), jnp.int32)
    want, got = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, targets) for f in (plain, chunked))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
