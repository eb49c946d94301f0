import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.compress import awq, calibrate, fold, recipe
from efflm.compress.awq import AWQ
from efflm.compress.plan import plan_of
from efflm.compress.quantize import Quantize
from efflm.compress.smoothquant import SmoothQuant, scales
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import layerwise
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import MODELS, seen_by

CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16))
STATIC = Quantize(activations="int8_static")
SCALING = (SmoothQuant(), AWQ(bits=4, group=16, grid=4))


def logits(model):
    batch = CONTEXT.calibration
    found = tiny.logits(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"])
    return np.asarray(found)[batch["segments"] > 0]


def with_outliers(model):
    """The same model, three channels of whose normalized activations are 60 times as large."""
    s = jnp.ones(model.config.width).at[jnp.array([3, 11, 30])].set(1 / 60)
    params = dict(model.params)
    for i, _ in enumerate(model.config.blocks):
        single = layerwise.block_config(model.config, i)
        for place in fold.places(single):
            if place.is_norm:
                params[f"block_{i}"] = fold.scale_inputs(single, params[f"block_{i}"], place, s)
    return model.replace(params=params)


def scaled(step, model):
    """The model with its inputs scaled, not rounded."""
    if isinstance(step, SmoothQuant):
        return step(model, CONTEXT)[0]
    one = lambda layer, read: (awq.scaled(layer, read, plan_of(step), step.grid)[0], None)
    return calibrate.walk(model, CONTEXT.calibration, one, awq.STATISTICS, mesh=CONTEXT.mesh)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", SCALING)
def test_the_model_computes_the_same(name, step):
    model = tiny.model(tiny.CONFIGS[name])
    after = scaled(step, model)
    np.testing.assert_allclose(logits(after), logits(model), atol=3e-4)
    if isinstance(step, SmoothQuant):  # AWQ leaves alone what rounds best as it is
        changed = set(step(model, CONTEXT)[1].leaves)
        assert {"block_0/attention_norm/scale", "block_1/attention/value/kernel"} <= changed
        assert ("block_1/feedforward/down/kernel" in changed) == model.config.gated


def test_scales_are_those_of_the_paper():
    x, w = jnp.array([4.0, 9.0, 0.0, 1.0]), jnp.array([1.0, 4.0, 2.0, 0.0])
    np.testing.assert_allclose(scales(x, w, 0.5), [2.0, 1.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(scales(x, w, 1.0), [4.0, 9.0, 1.0, 1.0], rtol=1e-6)


def test_after_it_inputs_and_weights_are_equally_large():
    model = tiny.model()
    after, _ = SmoothQuant(alpha=0.5)(model, CONTEXT)
    path = "block_0/feedforward/down/kernel"
    most = np.abs(dict(trees.flatten(after.params))[path]).max(1)
    np.testing.assert_allclose(seen_by(after, CONTEXT.calibration)[path]["largest"], most, rtol=1e-3)


def test_outliers_cost_plain_static_scales_more():
    model = with_outliers(tiny.model())
    full = logits(model)
    plain, _ = STATIC(model, CONTEXT)
    smooth, _ = recipe.apply(model, (SmoothQuant(), STATIC), CONTEXT)
    lost = [np.square(logits(each) - full).mean() for each in (plain, smooth)]
    assert lost[1] < 0.25 * lost[0]


def test_static_scales_are_of_the_largest_activation():
    model = tiny.model()
    after, record = Quantize(activations="int8_static", embeddings=0)(model, CONTEXT)
    seen = seen_by(model, CONTEXT.calibration)
    weights = dict(trees.flatten(after.params))
    assert STATIC(model, CONTEXT)[0].params["embedding"].activations == "int8"
    path = "block_0/attention/query/kernel"
    assert weights[path].activations == "int8_static"
    np.testing.assert_allclose(weights[path].activation_scale, seen[path]["largest"].max() / 127, rtol=1e-5)
    assert record.leaves
    assert 0 < np.abs(logits(after) - logits(model)).max() < 0.1 * np.abs(logits(model)).max()


def test_quantized_weights_are_not_scaled():
    model, _ = Quantize()(tiny.model(), CONTEXT)
    for step in (SmoothQuant(), AWQ()):
        with pytest.raises(InputError, match="is quantized already"):
            step(model, CONTEXT)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"alpha is 1\.5"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(InputError, match="grid is 0"):
        AWQ(grid=0)


def test_unused_heads_do_not_matter():
    model = tiny.model()
    dead = jax.tree.map(lambda x: x, model.params)
    dead["block_0"]["attention"]["value"]["kernel"] = jnp.zeros_like(dead["block_0"]["attention"]["value"]["kernel"])
    model = model.replace(params=dead)
    for step in SCALING:
        after = scaled(step, model)
        np.testing.assert_allclose(logits(after), logits(model), atol=3e-4)
