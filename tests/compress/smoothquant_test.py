import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.compress import awq, calibrate, fold, quantize, recipe
from efflm.compress.awq import AWQ
from efflm.compress.plan import plan_of
from efflm.compress.quantize import Quantize
from efflm.compress.smoothquant import SmoothQuant, scales
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import layerwise
from efflm.ops import Format, dot, quantize_array
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import MODELS, reads, seen_by

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


def test_after_it_weights_are_as_large_as_what_each_token_gives_of_their_input(monkeypatch):
    """Against numpy in float64: |w| max times s, of the root mean square of x / its token's root mean square."""
    model, path = tiny.model(), "block_0/feedforward/down/kernel"
    after, _ = SmoothQuant(alpha=0.5)(model, CONTEXT)
    x = reads(model, CONTEXT.calibration, monkeypatch)[path].astype(np.float64)
    size = np.sqrt(np.mean(np.square(x) / np.mean(np.square(x), axis=1, keepdims=True), axis=0))
    before, now = (np.abs(dict(trees.flatten(each.params))[path]).max(1) for each in (model, after))
    np.testing.assert_allclose(now, np.sqrt(size * before), rtol=1e-3)


def test_a_massive_activation_does_not_spoil_the_weights():
    """One token of 256 with an input of 3000, as a down matrix of SmolLM2 reads: tokens lose less than without scales,
    and less than with those of the largest magnitudes."""
    of_x, of_w = jax.random.split(jax.random.key(0))
    size = jnp.where(jnp.arange(192) % 48 == 0, 12.0, 1.0)
    x = (jax.random.normal(of_x, (256, 192)) * size[None]).at[0, 7].set(3000.0)
    w = jax.random.normal(of_w, (192, 64))

    def lost(s):
        rounded = quantize_array(w * s[:, None], -2, Format(activations="int8"))
        error = dot(x / s[None], rounded) - jnp.matmul(x, w, precision="highest")
        return jnp.mean(jnp.sum(error**2, 1) / jnp.sum((x @ w) ** 2, 1))

    def scaled_by(statistic, alpha):
        seen = statistic.update(statistic.init(192), x, jnp.ones((256, 1), bool))
        size = jnp.sqrt(seen / 256) if statistic is calibrate.SHARES else seen
        return lost(scales(size, jnp.max(jnp.abs(w), axis=1), alpha))

    ours = scaled_by(calibrate.SHARES, SmoothQuant().alpha)
    assert ours < 0.5 * lost(jnp.ones(192))
    assert ours < 0.1 * scaled_by(calibrate.LARGEST, 0.7)


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


def test_how_much_more_one_scale_for_all_costs():
    """The ratio of squared errors that rounding really makes, of tokens whose sizes differ by up to ten times."""
    size = jnp.exp(jax.random.uniform(jax.random.key(1), (64, 1), maxval=2.3))
    x = jax.random.normal(jax.random.key(0), (64, 4096)) * size
    read = {name: one.update(one.init(4096), x, jnp.ones((64, 1), bool)) for name, one in quantize.STATISTICS.items()}
    most = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    own, static = (jnp.mean(jnp.square(jnp.round(x / s) * s - x), axis=1) for s in (most / 127, most.max() / 127))
    np.testing.assert_allclose(quantize.static_error(read), jnp.mean(static / own), rtol=0.05)


def test_a_matrix_keeps_the_scales_of_tokens_where_one_for_all_costs_too_much(monkeypatch):
    model = tiny.model()
    x = reads(model, CONTEXT.calibration, monkeypatch)
    most = {path: np.abs(each).max(axis=1) for path, each in x.items() if path.startswith("block_0/")}
    costs = {path: each.max() ** 2 * np.mean(each**-2.0) for path, each in most.items()}
    low, high = costs["block_0/attention/query/kernel"], costs["block_0/feedforward/down/kernel"]
    assert high > 2 * low
    after, _ = dataclasses.replace(STATIC, static_error=float(low + high) / 2)(model, CONTEXT)
    kinds = {path: dict(trees.flatten(after.params))[path].activations for path in costs}
    assert kinds == {path: "int8_static" if cost < (low + high) / 2 else "int8" for path, cost in costs.items()}
    every, _ = dataclasses.replace(STATIC, static_error=0.0)(model, CONTEXT)
    assert {dict(trees.flatten(every.params))[path].activations for path in x if "block_" in path} == {"int8_static"}


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
    with pytest.raises(InputError, match=r"static_error is -1\.0, but must be positive"):
        Quantize(static_error=-1.0)


def test_unused_heads_do_not_matter():
    model = tiny.model()
    dead = jax.tree.map(lambda x: x, model.params)
    dead["block_0"]["attention"]["value"]["kernel"] = jnp.zeros_like(dead["block_0"]["attention"]["value"]["kernel"])
    model = model.replace(params=dead)
    for step in SCALING:
        after = scaled(step, model)
        np.testing.assert_allclose(logits(after), logits(model), atol=3e-4)
