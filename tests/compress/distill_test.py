import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.compress.distill import Distill, distillation_loss
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import sharding
from efflm.train.losses import kl_divergence
from tests import tiny


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.3), (4.0, 1.0)])
def test_loss_equals_its_equation_in_float64(rng, temperature, weight):
    student, teacher = rng.standard_normal((2, 2, 3, 5))
    targets, weights = rng.integers(0, 5, (2, 3)), np.array([[1, 1, 0], [1, 0, 0]], np.float64)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    kl = (p * np.log(p / q)).sum(-1) * temperature**2
    nll = -np.log(np.take_along_axis(softmax(student), targets[..., None], -1)[..., 0])
    expected = ((weight * kl + (1 - weight) * nll) * weights).sum() / weights.sum()
    loss, parts = distillation_loss(
        jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), targets, weights, temperature, weight
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(weight * parts["kl"] + (1 - weight) * parts["cross_entropy"], loss, rtol=1e-6)


def test_no_gradient_reaches_the_teacher(rng):
    student, teacher = jnp.asarray(rng.standard_normal((2, 1, 2, 5)), jnp.float32)
    loss = lambda s, t: distillation_loss(s, t, jnp.zeros((1, 2), int), jnp.ones((1, 2)), 2.0, 0.5)[0]
    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    assert np.any(to_student != 0)
    np.testing.assert_array_equal(to_teacher, 0)


def test_a_student_moves_towards_its_teacher_and_the_teacher_stays():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    context = Context(
        mesh=sharding.make_mesh(),
        teacher=teacher,
        corpus="the text",
        batches=lambda step: tiny.batch(student.config, seed=step),
    )
    kept = jax.tree.map(np.array, teacher.params)
    after, record = Distill(steps=30, learning_rate=1e-2, weight=1.0)(student, context)

    tokens = jnp.asarray(tiny.tokens(student.config, 4, 12, seed=99))
    kl = lambda model: float(kl_divergence(tiny.logits(teacher, tokens), tiny.logits(model, tokens)).mean())
    assert kl(after) < 0.9 * kl(student)
    jax.tree.map(np.testing.assert_array_equal, kept, teacher.params)
    assert (record.seed, record.corpus) == (0, "the text")


def test_a_missing_or_foreign_teacher_is_refused():
    model = tiny.model()
    context = Context(mesh=sharding.make_mesh(), batches=lambda step: tiny.batch(model.config))
    with pytest.raises(InputError, match="needs a teacher"):
        Distill(steps=1)(model, context)
    other = tiny.model(dataclasses.replace(tiny.LLAMA, vocabulary=301))
    with pytest.raises(InputError, match="vocabulary is 301, the student's 300"):
        Distill(steps=1)(model, dataclasses.replace(context, teacher=other))
    with pytest.raises(InputError, match="needs text"):
        Distill(steps=1)(model, Context(mesh=sharding.make_mesh(), teacher=model))
