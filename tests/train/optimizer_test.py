import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.config import InputError, TrainConfig
from efflm.train import optimizer
from tests import tiny


@pytest.mark.parametrize("name", tiny.SHAPES)
def test_decay_spares_norms_biases_and_embeddings(name):
    decayed = {path for path, decays in _flat_mask(tiny.model(tiny.SHAPES[name]).params) if decays}
    assert decayed
    for path in decayed:
        assert path.endswith("/kernel")
    kernels = {path for path, _ in trees.flatten(tiny.model(tiny.SHAPES[name]).params) if path.endswith("/kernel")}
    assert decayed == kernels


def _flat_mask(params):
    mask = optimizer.decay_mask(params)
    walk = lambda node, path: (
        [item for key, value in node.items() for item in walk(value, f"{path}/{key}" if path else key)]
        if isinstance(node, dict)
        else [(path, node)]
    )
    return walk(mask, "")


def test_schedule_warms_up_and_decays_to_its_end():
    config = TrainConfig(steps=100, warmup=10, learning_rate=2.0, final_fraction=0.1)
    rate = optimizer.schedule(config)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(100)], [0.0, 1.0, 2.0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rate(55), 0.2 + 1.8 * 0.5, rtol=1e-6)


def test_two_steps_of_adamw_equal_its_equations(rng):
    config = TrainConfig(
        steps=10, warmup=0, learning_rate=0.1, final_fraction=1.0, weight_decay=0.3, beta2=0.95, clip=1e9
    )
    w = rng.standard_normal((4, 3))
    params, tx = {"x": {"kernel": jnp.asarray(w, jnp.float32)}}, optimizer.adamw(config)
    state, m, v = tx.init(params), 0.0, 0.0
    for t in (1, 2):
        g = rng.standard_normal((4, 3))
        updates, state = tx.update({"x": {"kernel": jnp.asarray(g, jnp.float32)}}, state, params)
        params = {"x": {"kernel": params["x"]["kernel"] + updates["x"]["kernel"]}}
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.3 * w)
    np.testing.assert_allclose(params["x"]["kernel"], w, rtol=1e-4)


def test_the_gradient_is_clipped_to_its_norm():
    config = TrainConfig(steps=10, warmup=0, clip=1.0)
    big, small = ({"kernel": jnp.full((2, 2), value)} for value in (100.0, 0.5))
    params = {"kernel": jnp.ones((2, 2))}
    tx = optimizer.adamw(config)
    first = lambda grads: tx.update(grads, tx.init(params), params)[1][1][0].mu["kernel"]
    np.testing.assert_allclose(first(big), first(small), rtol=1e-5)  # both have norm 1 after clipping


@pytest.mark.parametrize(("steps", "warmup"), [(600, 40), (200, 20), (5, 0)])
def test_warm_up_is_a_tenth_unless_said_otherwise(steps, warmup):
    assert TrainConfig(steps=steps).warmup_steps == warmup
    assert TrainConfig(steps=steps, warmup=3).warmup_steps == 3
    assert np.all(np.isfinite([optimizer.schedule(TrainConfig(steps=steps))(t) for t in (0, 1, steps)]))


def test_warm_up_beyond_the_end_is_refused():
    with pytest.raises(InputError, match=r"train\.warmup is 20.*train\.steps=10"):
        TrainConfig(steps=10, warmup=20)
