import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import awq, calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.quantize import Quantize
from tests import reference_layers, surgeon, tiny
from tests.compress.smoothquant_test import CONTEXT, logits, with_outliers

FORMAT = ops.Format(bits=3, group=16)


def test_candidates_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    x, w = rng.lognormal(size=6), rng.standard_normal((6, 5))
    groups = np.abs(w).reshape(2, 3, 5)
    w_mean = (groups / groups.max(axis=1, keepdims=True)).reshape(6, 5).mean(axis=1)
    given = [(jnp.asarray(part, jnp.float32), ops.Format(bits=4, group=3)) for part in (w[:, :2], w[:, 2:])]
    np.testing.assert_allclose(awq.weight_means(given), w_mean, rtol=1e-5)
    plain, *found = awq.candidates(jnp.asarray(x, jnp.float32), jnp.asarray(w_mean, jnp.float32), 4)
    assert (plain == 1).all()
    for a, s in zip((0, 0.25, 0.5, 0.75), found, strict=True):
        wanted = x**a / w_mean ** (1 - a)
        np.testing.assert_allclose(s, wanted / np.sqrt(wanted.max() * wanted.min()), rtol=1e-5)


def by_running(layer, place, s):
    """The squared error of what a part of a layer gives, where it is scaled by s, rounded, and run."""
    weights = dict(trees.flatten(layer.params))
    changed = dict(trees.flatten(fold.scale_inputs(layer.config, layer.params, place, s)))
    for path in place.readers:
        changed[path] = ops.dequantize(ops.quantize_array(changed[path], -2, FORMAT))
    if place.last.startswith("attention"):  # so that the layer adds the output of attention alone
        for each in (weights, changed):
            each["feedforward/down/kernel"] = jnp.zeros_like(weights["feedforward/down/kernel"])
    total = 0.0
    for row in layer.rows:
        full, low = (np.asarray(layer(trees.unflatten(each), *row), np.float64) for each in (weights, changed))
        total += np.square(low - full)[np.asarray(row[-1]) > 0].sum()
    return total


def test_it_takes_the_scales_with_which_a_part_of_a_layer_loses_least():
    model, seen = with_outliers(tiny.model(dataclasses.replace(tiny.LLAMA, layers=1))), []
    keep = lambda layer, read: (layer, seen.append((layer, read)))
    calibrate.walk(model, CONTEXT.calibration, keep, awq.STATISTICS, mesh=CONTEXT.mesh)
    ((layer, read),) = seen
    for place in fold.places(layer.config):
        states = read[place.readers[0]]
        matrices = [(dict(trees.flatten(layer.params))[path], FORMAT) for path in place.readers]
        each = awq.candidates(states["magnitudes"] / states["tokens"], awq.weight_means(matrices), 4)
        tried = [fold.shared(layer.config, place, s) for s in each]
        errors = [by_running(layer, place, s) for s in tried]
        found = awq.best_scales(layer, place, dict.fromkeys(place.readers, FORMAT), states, 4)
        np.testing.assert_array_equal(found, tried[int(np.argmin(errors))])
        assert not place.is_norm or min(errors) < 0.7 * errors[0]


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_and_codes_are_those_of_the_reference_program(bits):
    x, w = surgeon.layer(reference_layers.SEED, reference_layers.K, reference_layers.N)
    there, format = np.load(reference_layers.FILE), ops.Format(bits=bits, group=reference_layers.GROUP, symmetric=False)
    matrix = fold.Place(("feedforward/down/kernel",), "feedforward/up", "feedforward/down/kernel")
    layer = Layer(trees.unflatten({matrix.last: jnp.asarray(w)}), {}, [(x[None],)], [], tiny.LLAMA, 0)
    read = {"magnitudes": np.abs(x).sum(axis=0), "tokens": len(x), "gram": jnp.asarray(x.T @ x)}
    s = awq.best_scales(layer, matrix, {matrix.last: format}, read, 20)
    np.testing.assert_allclose(s, there[f"awq{bits} scales"], rtol=1e-3)  # it adds 1e-4 to the means of weights
    found = awq.scaled_and_rounded(jnp.asarray(w), s, jnp.diag(read["gram"]), format)
    assert np.mean(np.isclose(found, there[f"awq{bits}"], rtol=1e-2, atol=1e-4)) > 0.99
    np.testing.assert_allclose(surgeon.loss(w, found, x), surgeon.loss(w, there[f"awq{bits}"], x), rtol=0.01)


def test_it_loses_less_than_plain_rounding():
    model = with_outliers(tiny.model())
    format = {"bits": 3, "group": 16, "embeddings": 0}
    scaled, _ = awq.AWQ(**format, grid=4)(model, CONTEXT)
    plain, _ = Quantize(**format, clip=True)(model, CONTEXT)
    lost = [np.square(logits(each) - logits(model)).mean() for each in (scaled, plain)]
    assert lost[0] < 0.6 * lost[1]
