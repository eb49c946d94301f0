"""Against float64 numpy, gradients included; memory and the shapes in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.ops.qarray import QArray
from tests.ops.cross_entropy_test import capped, draw, pulled
from tests.programs import largest_array


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(x, w, teacher_x, teacher_w, targets, weights, temperature, share, caps=(0.0, 0.0)):
    """The three sums, and the gradients of the first to x and w, float64; both w are [width, V]."""
    (student, of_cap), (teacher, _) = capped(x @ w, caps[0]), capped(teacher_x @ teacher_w, caps[1])
    p, q, q1 = softmax(teacher / temperature), softmax(student / temperature), softmax(student)
    kl = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    nll = -np.log(np.take_along_axis(q1, targets[..., None], -1)[..., 0])
    slope = share * temperature * (q - p) + (1 - share) * (q1 - np.eye(w.shape[1])[targets])
    slope = weights[..., None] * slope * of_cap
    total = share * kl + (1 - share) * nll
    sums = [(weights * values).sum() for values in (total, kl, nll)]
    return sums, slope @ w.T, np.einsum("btd,btv->dv", x, slope)


def stored(w, tied, dtype=jnp.float32):
    return jnp.asarray(w.T if tied else w, dtype)


@pytest.mark.parametrize(("tied", "teacher_tied"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("temperature", "share", "caps"), [(1.0, 0.3, (0.0, 0.0)), (4.0, 1.0, (0.0, 0.0)), (2.0, 0.6, (1.5, 2.5))]
)
@pytest.mark.parametrize(("B", "T"), [(2, 5), (3, 700)])
def test_sums_and_gradients_equal_float64(rng, tied, teacher_tied, temperature, share, caps, B, T):
    x, w, targets, weights = draw(rng, B, T, 16, 37)
    teacher_x, teacher_w, *_ = draw(rng, B, T, 24, 37)
    sums, dx, dw = reference(x, w, teacher_x, teacher_w, targets, weights, temperature, share, caps)
    teacher = jnp.asarray(teacher_x, jnp.float32), stored(teacher_w, teacher_tied), teacher_tied

    def loss(x, w):
        how = {"temperature": temperature, "share": share, "caps": caps}
        return ops.distillation((x, w, tied), teacher, targets, weights, **how)

    got, (got_dx, got_dw) = pulled(loss, jnp.asarray(x, jnp.float32), stored(w, tied), by=(3, 7, 5))
    np.testing.assert_allclose(got, sums, rtol=1e-5)
    # no gradient flows from the other sums
    np.testing.assert_allclose(got_dx, 3 * dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_dw.T if tied else got_dw, 3 * dw, rtol=1e-4, atol=2e-4)


def test_an_int8_teacher_in_bfloat16_teaches_a_float32_student(rng):
    x, w, targets, weights = draw(rng, 2, 9, 16, 37)
    teacher_x, teacher_w, *_ = draw(rng, 2, 9, 24, 37)
    rounded = ops.quantize_array(jnp.asarray(teacher_w, jnp.float32), axis=0)
    teacher_x = jnp.asarray(teacher_x, jnp.bfloat16)
    low = np.asarray(ops.dequantize(rounded).astype(jnp.bfloat16), np.float64)
    sums, dx, dw = reference(x, w, np.asarray(teacher_x, np.float64), low, targets, weights, 2.0, 0.5)

    def loss(x, w):
        return ops.distillation(
            (x, w, False), (teacher_x, rounded, False), targets, weights, temperature=2.0, share=0.5
        )

    got, gradients = pulled(loss, jnp.asarray(x, jnp.float32), stored(w, False), by=(1, 0, 0))
    np.testing.assert_allclose(got, sums, rtol=1e-5)
    for gradient, want in zip(gradients, (dx, dw), strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)


def test_an_int8_student_is_scored(rng):
    x, w, targets, weights = draw(rng, 2, 9, 16, 37)
    rounded = ops.quantize_array(jnp.asarray(w.T, jnp.float32), axis=1)
    assert isinstance(rounded, QArray)
    teacher = jnp.asarray(x, jnp.float32), stored(w, False), False
    want, _, _ = reference(x, np.asarray(ops.dequantize(rounded), np.float64).T, x, w, targets, weights, 1.0, 0.5)
    run = lambda x, w: ops.distillation((x, w, True), teacher, targets, weights, temperature=1.0, share=0.5)
    got = jax.jit(run)(jnp.asarray(x, jnp.float32), rounded)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_a_model_has_no_divergence_to_itself(rng):
    x, w, targets, weights = draw(rng, 2, 5, 16, 37)
    x, w = jnp.asarray(x, jnp.float32), stored(w, False)

    def loss(student, teacher):
        return ops.distillation((*student, False), (*teacher, False), targets, weights, temperature=2.0, share=0.5)

    (_, kl, _), (to_student, to_teacher) = pulled(loss, (x, w), (x, w), by=(1, 0, 0))
    np.testing.assert_allclose(kl, 0, atol=1e-5)
    assert all(np.any(gradient != 0) for gradient in to_student)
    jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0), to_teacher)


def from_logits(student_BTV, teacher_BTV, targets_BT, temperature):
    """temperature^2 * KL(teacher || student) and -log p(target) at every position, as autodiff takes them."""
    log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher_BTV, student_BTV))
    chosen_BT = jnp.take_along_axis(jax.nn.log_softmax(student_BTV), targets_BT[..., None], axis=-1)[..., 0]
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), -chosen_BT


def plain(student, teacher, targets_BT):
    student_BTV = jnp.einsum("BTD,VD->BTV", *student)
    teacher_BTV = jnp.einsum("BTD,DV->BTV", *teacher)
    kl_BT, nll_BT = from_logits(student_BTV, teacher_BTV, targets_BT, temperature=2.0)
    return jnp.sum(0.7 * kl_BT + 0.3 * nll_BT)


def chunked(student, teacher, targets_BT):
    weights = jnp.ones(targets_BT.shape)
    return ops.distillation((*student, True), (*teacher, False), targets_BT, weights, temperature=2.0, share=0.7)[0]


def test_a_large_vocabulary_takes_a_tenth_of_the_memory():
    B, T, V = 16, 512, 49152
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = (array(B, T, 64), array(V, 64)), (array(B, T, 96), array(96, V))
    targets = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiled = [jax.jit(jax.value_and_grad(f)).lower(*arrays, targets).compile() for f in (plain, chunked)]
    before, after = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert before > 10 * after
    assert largest_array(compiled[0]) == B * T * V
    assert largest_array(compiled[1]) <= B * T * V // 16
