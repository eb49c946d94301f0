import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.model import Transformer
from efflm.parallel import meshes
from efflm.train import losses
from efflm.train.step import make_step
from tests import tiny

CONFIG = dataclasses.replace(tiny.LLAMA, layers=1).config()
LOSSES = {
    "language model": losses.language_model_loss(CONFIG, z_loss=0.01),
    "distillation": losses.distillation_loss(Transformer(CONFIG), Transformer(CONFIG), temperature=1.0, weight=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_ratios_of_weights_matter(name):
    """Also where they add up to far less than 1, and where the batch is read in parts."""
    params, teacher, batch = tiny.model(CONFIG).params, tiny.model(CONFIG, seed=1).params, tiny.batch(CONFIG)
    state = tiny.init_state(params, optax.sgd(0.1), meshes.make_mesh())
    weights = np.random.default_rng(0).random(batch["targets"].shape).astype(np.float32)
    outcomes = []
    for parts in (1, 2):
        step = make_step(LOSSES[name], optax.sgd(0.1), 0, state, parts)
        for factor in (1.0, 1e-15):
            own = jax.tree.map(jnp.copy, state)  # a step donates its state
            new, metrics = step(own, teacher, batch | {"weights": weights * np.float32(factor)})
            weight = metrics.pop("weight")
            np.testing.assert_allclose(weight, factor * np.sum(weights * (batch["segments"] > 0)), rtol=1e-5)
            outcomes.append(jax.device_get((new.trainable, metrics)))
    for other in outcomes[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other, outcomes[0])


def test_the_mean_over_no_targets_is_zero():
    assert losses.weighted_mean({"loss": jnp.float32(0)}, jnp.float32(0)) == {"loss": 0}


def test_the_error_of_hidden_states_and_its_gradients_equal_float64(rng):
    B, T, D, E, layers = 2, 5, 6, 4, ((0, 2), (2, 1))
    states, teacher = rng.standard_normal((3, B, T, D)), rng.standard_normal((3, B, T, E))
    matrices, weights = rng.standard_normal((3, D, E)), rng.random((B, T))
    total, of_states, of_matrices = 0.0, np.zeros_like(states), np.zeros_like(matrices)
    for ours, theirs in layers:
        error = states[ours] @ matrices[ours] - teacher[theirs]
        slope = 2 / E * weights[..., None] * error
        total += (weights * (error**2).mean(-1)).sum()
        of_states[ours] = slope @ matrices[ours].T
        of_matrices[ours] = np.einsum("btd,bte->de", states[ours], slope)

    def loss(states, teacher, matrices):
        named = {losses.projection_name(i): matrix for i, matrix in enumerate(matrices)}
        return losses.hidden_state_error(states, teacher, named, layers, jnp.float32(weights))

    low = [list(jnp.float32(each)) for each in (states, teacher, matrices)]
    got, (got_states, got_teacher, got_matrices) = jax.value_and_grad(loss, argnums=(0, 1, 2))(*low)
    np.testing.assert_allclose(got, total, rtol=1e-5)
    np.testing.assert_allclose(got_states, of_states, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got_matrices, of_matrices, rtol=1e-4, atol=1e-6)
    assert not np.any(got_teacher)


def test_hidden_states_of_equal_width_are_compared_as_they_are(rng):
    states, teacher = rng.standard_normal((2, 2, 1, 3, 4)).astype(np.float32)
    got = losses.hidden_state_error(list(states), list(teacher), {}, ((1, 0),), jnp.ones((1, 3)))
    np.testing.assert_allclose(got, ((states[1] - teacher[0]) ** 2).mean(-1).sum(), rtol=1e-5)
