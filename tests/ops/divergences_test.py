"""Values against float64 numpy, gradients against central differences of it; what each divergence promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops
from efflm.ops.divergences import DIVERGENCES
from tests.ops.cross_entropy_test import pulled

T = (0.5, 1.0, 4.0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(log_a, log_b):
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def reference(name, teacher, student, mix):
    """The divergence of softmax(teacher) and softmax(student), float64 [M], from its definition."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    log_m = np.logaddexp(np.log(mix) + log_p, np.log(1 - mix) + log_q)
    return {
        "forward": lambda: kl(log_p, log_q),
        "reverse": lambda: kl(log_q, log_p),
        "jensen_shannon": lambda: mix * kl(log_p, log_m) + (1 - mix) * kl(log_q, log_m),
        "skew": lambda: kl(log_p, log_m),
    }[name]()


def differences(fn, x, step=1e-5):
    """d fn(x)[m] / d x[m, v] by central differences, float64 [M, V]."""
    out = np.empty_like(x)
    for v in range(x.shape[1]):
        shift = np.zeros_like(x)
        shift[:, v] = step
        out[:, v] = (fn(x + shift) - fn(x - shift)) / (2 * step)
    return out


def draw(rng, extreme, rows=6, V=11):
    """Logits [rows, V] of teacher and student, in float64 as float32 holds them."""
    if extreme:
        teacher, student = rng.choice([-50.0, 0.0, 50.0], (2, rows, V))
    else:
        teacher, student = 2 * rng.standard_normal((2, rows, V))
    return np.float64(np.float32(teacher)), np.float64(np.float32(student))


def computed(name, teacher, student, mix):
    """The values, float32 [M], and their gradients to the student's logits, [M, V]."""
    return _computed(name, *(jnp.asarray(logits, jnp.float32) for logits in (teacher, student)), mix)


@functools.partial(jax.jit, static_argnums=0)
def _computed(name, teacher, student, mix):
    of = lambda logits: DIVERGENCES[name](jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits), mix)
    values, pull = jax.vjp(of, student)
    return values, pull(jnp.ones_like(values))[0]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_equal_float64(rng, name, mix, temperature, extreme):
    teacher, student = (logits / temperature for logits in draw(rng, extreme))
    values, gradient = computed(name, teacher, student, mix)
    np.testing.assert_allclose(values, reference(name, teacher, student, mix), rtol=2e-5, atol=1e-6)
    want = differences(lambda x: reference(name, teacher, x, mix), student)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_sums_and_gradients_of_the_chunked_loss_equal_the_plain_composition(rng, name, temperature):
    B, length, D, V, share, mix = 3, 700, 8, 37, 0.3, 0.2
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, w, teacher_x, teacher_w = normal(B, length, D), normal(V, D), normal(B, length, 12), normal(12, V)
    targets, weights = rng.integers(0, V, (B, length)), jnp.asarray(rng.random((B, length)), jnp.float32)

    def plain(x, w):
        log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher_x @ teacher_w, x @ w.T))
        m = mix * jnp.exp(log_p) + (1 - mix) * jnp.exp(log_q)
        kl = lambda log_a, log_b: jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
        each = {
            "forward": lambda: kl(log_p, log_q),
            "reverse": lambda: kl(log_q, log_p),
            "jensen_shannon": lambda: mix * kl(log_p, jnp.log(m)) + (1 - mix) * kl(log_q, jnp.log(m)),
            "skew": lambda: kl(log_p, jnp.log(m)),
        }[name]() * temperature**2
        nll = -jnp.take_along_axis(jax.nn.log_softmax(x @ w.T), jnp.asarray(targets)[..., None], axis=-1)[..., 0]
        return tuple(jnp.sum(weights * values) for values in (share * each + (1 - share) * nll, each, nll))

    def chunked(x, w):
        outputs = (x, w, True), (teacher_x, teacher_w, False)
        how = {"temperature": temperature, "share": share, "divergence": name, "mix": mix}
        return ops.distillation(*outputs, jnp.asarray(targets), weights, **how)

    (got, gradients), (want, gradients_plain) = (pulled(fn, x, w, by=(1, 0, 0)) for fn in (chunked, plain))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for ours, theirs in zip(gradients, gradients_plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


logits = st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5).map(lambda x: np.array([x], np.float32))
mixes = st.floats(0.01, 0.99)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(teacher=logits, student=logits, mix=mixes)
@settings(max_examples=30, deadline=None)
def test_they_are_not_negative_and_zero_with_zero_gradient_for_equal_models(name, teacher, student, mix):
    values, gradient = computed(name, teacher, student, mix)
    assert np.all(np.isfinite(gradient))
    assert values >= -1e-6
    np.testing.assert_allclose(np.sum(gradient, axis=-1), 0, atol=1e-4)  # all logits may move together
    values, gradient = computed(name, teacher, teacher, mix)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@given(teacher=logits, student=logits, mix=mixes)
@settings(max_examples=30, deadline=None)
def test_each_is_what_it_should_be_beside_the_others(teacher, student, mix):
    value = lambda name, a, b, mix: float(computed(name, a, b, mix)[0][0])
    forward, reverse = (value(name, teacher, student, mix) for name in ("forward", "reverse"))
    assert reverse == pytest.approx(value("forward", student, teacher, mix), rel=1e-4, abs=1e-5)
    mixture = value("jensen_shannon", teacher, student, mix)
    assert mixture == pytest.approx(value("jensen_shannon", student, teacher, 1 - mix), rel=1e-4, abs=1e-5)
    assert mixture <= min(mix * forward, (1 - mix) * reverse, -mix * np.log(mix) - (1 - mix) * np.log1p(-mix)) + 1e-5
    assert value("skew", teacher, student, mix) <= min(forward, -np.log(mix)) + 1e-5


@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
def test_between_nearly_equal_models_all_are_a_multiple_of_kl(rng, mix):
    teacher, _ = draw(rng, extreme=False)
    student = teacher + 0.03 * rng.standard_normal(teacher.shape)
    sums = {name: float(computed(name, teacher, student, mix)[0].sum()) for name in DIVERGENCES}
    kl = sums["forward"]
    assert sums["reverse"] == pytest.approx(kl, rel=0.1)
    assert sums["jensen_shannon"] == pytest.approx(mix * (1 - mix) * kl, rel=0.1)
    assert sums["skew"] == pytest.approx((1 - mix) ** 2 * kl, rel=0.1)
