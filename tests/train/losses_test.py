import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.model import Transformer, sharding
from efflm.train import losses
from efflm.train.step import init_state, make_step
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
    state = init_state(params, optax.sgd(0.1), sharding.make_mesh())
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
