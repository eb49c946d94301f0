import importlib

import jax
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress.calibrate import GRAM, LARGEST, MAGNITUDES, SQUARES, TOKENS, map_blocks
from efflm.config import InputError
from efflm.model import Transformer, placement
from efflm.parallel import meshes
from tests import tiny

dot = importlib.import_module("efflm.ops.dot")  # efflm.ops.dot is the function
ALL = {"gram": GRAM, "largest": LARGEST, "magnitudes": MAGNITUDES, "squares": SQUARES, "tokens": TOKENS}
MODELS = tiny.and_combinations(list(tiny.CONFIGS), ["llama", "neox"])


def seen_by(model, batch, statistics=ALL, mesh=None):
    """{path: {name: statistic}} of all layers."""
    seen = {}

    def keep(layer, states):
        for path, state in states.items():
            seen[f"block_{layer.index}/{path}"] = jax.tree.map(np.asarray, state)
        return layer

    map_blocks(model, batch, statistics, keep, mesh=mesh or meshes.make_mesh())
    return seen


def reads(model, batch, monkeypatch):
    """{path: x [n, in] of the tokens that count}: what the products of a plain forward pass multiply."""
    found, weights = {}, {id(leaf): path for path, leaf in trees.flatten(model.params)}
    counted, product = batch["segments"].reshape(-1) > 0, dot._product

    def watched(x, w, transpose):
        if id(w) in weights and not transpose:
            found[weights[id(w)]] = np.asarray(x, np.float64).reshape(-1, x.shape[-1])[counted]
        return product(x, w, transpose)

    monkeypatch.setattr(dot, "_product", watched)
    with jax.disable_jit():
        inputs = {"segments": batch["segments"], "positions": batch["positions"]}
        Transformer(model.config).apply({"params": model.params}, batch["inputs"], **inputs)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_what_linear_layers_multiply(name, monkeypatch):
    model = tiny.model(tiny.CONFIGS[name])
    batch = tiny.batch(model.config, rows=11)  # a chunk that is not full, too
    seen, x = seen_by(model, batch), reads(model, batch, monkeypatch)
    assert seen.keys() == {path for path, _ in trees.flatten(model.params) if path.endswith("kernel")}
    for path, states in seen.items():
        each = x[path]
        np.testing.assert_allclose(states["gram"], each.T @ each, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(states["largest"], np.abs(each).max(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(states["magnitudes"], np.abs(each).sum(0), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(states["squares"], np.square(each).sum(0), rtol=1e-4, atol=1e-3)
        assert states["tokens"] == len(each) == (batch["segments"] > 0).sum()


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_left_alone_compute_what_the_model_does(name):
    model = tiny.model(tiny.CONFIGS[name])
    batch, outputs = tiny.batch(model.config, rows=11), []

    def keep(layer, _):
        outputs[:] = [layer(layer.params, *row) for row in layer.rows]
        return layer

    after = map_blocks(model, batch, {}, keep, mesh=meshes.make_mesh())
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, after.params, model.params))
    norm = model.params["final_norm"]
    last = ops.Normed(np.concatenate(outputs)[:11], norm["scale"], norm.get("bias"), epsilon=model.config.norm_epsilon)
    transformer = Transformer(model.config)
    found = transformer.apply({"params": model.params}, ops.normalize(last), method="unembed")
    wanted = tiny.logits(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"])
    counted = batch["segments"] > 0
    np.testing.assert_allclose(np.asarray(found)[counted], np.asarray(wanted)[counted], atol=2e-5)


def test_a_layer_is_fed_by_those_already_made():
    model = tiny.model()
    batch, first, second = tiny.batch(model.config), [], []

    def halve(layer, states):
        (first, second)[layer.index].append(states["attention/query/kernel"]["squares"])
        down = layer.params["feedforward"]["down"]["kernel"]
        half = {"down": {"kernel": down * 0.5}}
        return layer.replace(params={**layer.params, "feedforward": layer.params["feedforward"] | half})

    after = map_blocks(model, batch, {"squares": SQUARES}, halve, mesh=meshes.make_mesh())
    seen = seen_by(after, batch)  # of a model that is as the first pass left it
    np.testing.assert_allclose(first[0], seen["block_0/attention/query/kernel"]["squares"], rtol=1e-5)
    np.testing.assert_allclose(second[0], seen["block_1/attention/query/kernel"]["squares"], rtol=1e-5)
    before = seen_by(model, batch)["block_1/attention/query/kernel"]["squares"]
    assert np.abs(second[0] / before - 1).max() > 1e-3


def test_layers_that_read_the_same_share_a_state():
    shared = []

    def keep(layer, states):
        query, key, gate, up, down = (
            states[f"{name}/kernel"]["gram"]
            for name in ("attention/query", "attention/key", "feedforward/gate", "feedforward/up", "feedforward/down")
        )
        shared.append((query is key, gate is up, up is down))
        return layer

    model = tiny.model()
    map_blocks(model, tiny.batch(model.config), {"gram": GRAM}, keep, mesh=meshes.make_mesh())
    assert shared == [(True, True, False)] * 2


def test_on_a_mesh_statistics_are_the_same():
    model = tiny.model()
    batch = tiny.batch(model.config, rows=11)
    mesh = meshes.make_mesh(data=4)
    spread = jax.device_put(model, placement.shardings(model, mesh))
    one, many = seen_by(model, batch), seen_by(spread, batch, mesh=mesh)
    for path, states in one.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), states, many[path])


def test_without_text_the_error_says_so():
    with pytest.raises(InputError, match="needs calibration text"):
        map_blocks(tiny.model(), None, {}, lambda layer, _: layer, mesh=meshes.make_mesh(), title="Wanda")
