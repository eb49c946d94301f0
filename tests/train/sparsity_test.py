import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm import trees
from efflm.config import InputError
from efflm.model import stack_blocks
from efflm.model.params import in_layer
from efflm.ops.selection import smallest
from efflm.parallel import meshes
from efflm.train import losses
from efflm.train.sparsity import cubic, gradual, stages
from efflm.train.step import make_step, place
from tests import tiny


def test_the_schedule():
    found = [cubic(0.8, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    np.testing.assert_allclose(found, [0.0, 0.8 * (1 - 0.75**3), 0.8 * 0.875, 0.8], rtol=1e-12)
    assert [stages(*each) for each in ((100, 10), (105, 10), (5, 10))] == [10, 10, 1]


def weights(seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((6, 7)).astype(np.float32)
    matrix[:2] = 0.5  # ties
    return {"block_0": {"attention": {"query": {"kernel": matrix}}}, "embedding": rng.standard_normal((5, 6))}


def of(tree):
    return np.asarray(tree["block_0"]["attention"]["query"]["kernel"])


def test_counts_are_exact_at_every_stage_and_what_is_dropped_stays_zero():
    params = jax.tree.map(jnp.float32, weights())
    rule, rng = gradual(optax.adam(0.05), 0.7, steps=12, every=3), np.random.default_rng(1)
    state, update, zero = rule.init(params), jax.jit(rule.update), np.zeros((6, 7), bool)
    for step in range(20):
        before = of(params)
        grads = jax.tree.map(lambda w: jnp.float32(rng.standard_normal(w.shape)), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        wanted = round(0.7 * (1 - (1 - min(step // 3, 4) / 4) ** 3) * 42)
        now = of(params) == 0
        assert now.sum() == wanted, step
        np.testing.assert_array_equal(now, ~of(state.masks))
        assert np.all(now[zero])
        if step % 3 == 0:  # the smallest of the weights before
            assert np.abs(before[now]).max(initial=0) <= np.abs(before[~now]).min()
        zero = now
    assert state.masks["embedding"] is None
    assert np.all(np.asarray(params["embedding"]) != 0)


def test_the_rule_does_not_see_what_is_dropped():
    params = jax.tree.map(jnp.float32, weights())
    seen = []

    def spy(updates, state, params=None):
        seen.append(of(updates))
        return updates, state

    rule = gradual(optax.GradientTransformation(lambda params: (), spy), 0.5, steps=1, every=1)
    state, grads = rule.init(params), jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(seen[0] == 1)
    assert (seen[1] == 0).sum() == 21
    np.testing.assert_array_equal(seen[1] == 0, ~of(state.masks))
    np.testing.assert_array_equal(of(params) == 0, ~of(state.masks))


@pytest.mark.parametrize("scan", [False, True])
def test_in_the_trainer_on_several_devices(scan):
    """Each layer of a stack has its own count."""
    model, mesh = tiny.model(), meshes.make_mesh(data=2, fsdp=2, tensor=2)
    rule = gradual(optax.adamw(1e-2), 0.6, steps=4, every=2)
    start = stack_blocks(model.params, model.config) if scan else model.params
    state = tiny.init_state(start, rule, mesh)
    step = make_step(losses.language_model_loss(model.config, scanned=scan), rule, 0, state)
    for i in range(6):
        state, metrics = step(state, {}, place(tiny.batch(model.config, seed=i), mesh))
    assert np.isfinite(metrics["loss"])
    assert step._cache_size() == 1
    masks = dict(trees.flatten(state.optimizer.masks))
    for path, w in trees.flatten(state.trainable):
        w = np.asarray(w)
        assert (path in masks) == in_layer(path)
        for layer, mask in zip(w if scan else [w], masks[path] if scan else [masks[path]]) if path in masks else ():
            assert (layer == 0).sum() == round(0.6 * layer.size), path
            np.testing.assert_array_equal(layer != 0, np.asarray(mask))


def test_ties_go_by_their_place():
    np.testing.assert_array_equal(smallest(jnp.float32([1, 0, 1, 1, 2]), 3), [True, True, True, False, False])


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="sparsity is 1"):
        gradual(optax.sgd(0.1), 1.0, steps=4)
    with pytest.raises(InputError, match="every is 0"):
        gradual(optax.sgd(0.1), 0.5, steps=4, every=0)
    with pytest.raises(InputError, match="rises over 0 steps"):
        gradual(optax.sgd(0.1), 0.5, steps=0)
    rule = gradual(optax.sgd(0.1), 0.5, steps=4)
    params = jax.tree.map(jnp.float32, weights())
    with pytest.raises(ValueError, match="params"):
        rule.update(params, rule.init(params))
