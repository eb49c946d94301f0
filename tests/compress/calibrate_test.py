import importlib

import jax
import numpy as np
import pytest

from efflm import trees
from efflm.compress.calibrate import FISHER, GRAM, LARGEST, MAGNITUDES, SHIFT, SQUARES, TOKENS, Statistic, walk
from efflm.config import InputError
from efflm.model import Transformer, layerwise, placement
from efflm.parallel import meshes
from efflm.train.losses import language_model_loss
from tests import tiny

dot = importlib.import_module("efflm.ops.dot")  # efflm.ops.dot is the function
ALL = {"gram": GRAM, "largest": LARGEST, "magnitudes": MAGNITUDES, "squares": SQUARES, "tokens": TOKENS}
MESH = meshes.make_mesh()
MODELS = tiny.and_combinations(list(tiny.CONFIGS), ["llama", "neox", "gemma"])


def seen_by(model, batch, statistics=ALL, mesh=None):
    """{path: {name: statistic}} of all layers."""
    seen = {}

    def keep(layer, states):
        for path, state in states.items():
            seen[f"block_{layer.index}/{path}"] = jax.tree.map(np.asarray, state)
        return layer, None

    walk(model, batch, keep, statistics, mesh=mesh or meshes.make_mesh())
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
        return layer, layer.index

    after, found = walk(model, batch, keep, mesh=meshes.make_mesh())
    assert found == [0, 1]
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, after.params, model.params))
    last = layerwise.final_states(model.config, model.params, np.concatenate(outputs)[:11])
    found = Transformer(model.config).apply({"params": model.params}, last, method="unembed")
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
        return layer.replace(params={**layer.params, "feedforward": layer.params["feedforward"] | half}), None

    after, _ = walk(model, batch, halve, {"squares": SQUARES}, mesh=meshes.make_mesh())
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
        return layer, None

    model = tiny.model()
    walk(model, tiny.batch(model.config), keep, {"gram": GRAM}, mesh=meshes.make_mesh())
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
        walk(tiny.model(), None, lambda layer, _: (layer, None), mesh=meshes.make_mesh(), title="Wanda")
    with pytest.raises(InputError, match=r"^calibrating needs calibration text"):
        walk(tiny.model(), None, lambda layer, _: (layer, None), mesh=meshes.make_mesh(), title=None)


def halved(layer, paths):
    """A layer with these of its weights halved."""
    half = lambda path, w: w * 0.5 if path in paths else w
    return layer.replace(params=trees.map_with_path(half, layer.params))


@pytest.mark.parametrize("name", MODELS)
def test_sublayers_read_what_those_before_them_in_the_layer_make(name):
    """Each is given, in the order in which they compute, what it reads in the model that is made in the end."""
    model = tiny.model(tiny.CONFIGS[name])
    batch = tiny.batch(model.config)
    halve = lambda layer, read: (halved(layer, read), {layer.path(path): each["gram"] for path, each in read.items()})
    after, found = walk(model, batch, halve, {"gram": GRAM}, mesh=meshes.make_mesh(), sublayers=True)
    whole, _ = walk(model, batch, lambda layer, read: (halved(layer, read), None), {"gram": GRAM}, mesh=MESH)
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params, whole.params))
    names = [[path.split("/")[2] for path in each] for each in found[:4]]
    assert names == [
        ["query", "key", "value"],
        ["output"],
        [*(["gate"] * model.config.gated), "up"],
        ["down"],
    ]
    made, before = seen_by(after, batch), seen_by(model, batch)
    for each in found:
        for path, gram in each.items():
            np.testing.assert_allclose(gram, made[path]["gram"], rtol=1e-4, atol=1e-4, err_msg=path)
    path = "block_0/attention/output/kernel"
    assert np.abs(np.diag(made[path]["gram"] / before[path]["gram"]) - 1).min() > 0.3


def test_two_streams_are_both_models():
    model = tiny.model()
    batch = tiny.batch(model.config, rows=11)
    both = Statistic(lambda K: np.zeros((K, K)), lambda total, x, other, _: total + x.T @ other, of="pairs")

    def halve(layer, read):
        wanted = np.concatenate(layer.wanted)
        here = np.concatenate([row[0] for row in layer.rows])
        return halved(layer, ["attention/value/kernel"]), (wanted, here, read)

    after, found = walk(model, batch, halve, {"both": both}, mesh=MESH, reference=True)
    give = lambda layer, _: (layer, np.concatenate([layer(layer.params, *row) for row in layer.rows]))
    (_, of_model), (_, of_after) = (walk(each, batch, give, mesh=MESH) for each in (model, after))
    for wanted, (found_there, _, _) in zip(of_model, found, strict=True):
        np.testing.assert_allclose(found_there, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1][1], of_after[0], rtol=1e-5, atol=1e-6)
    assert np.abs(found[1][1] - found[0][0]).max() > 1e-3  # the streams differ
    path = "attention/query/kernel"
    gram = seen_by(model, batch)[f"block_0/{path}"]["gram"]
    np.testing.assert_allclose(found[0][2][path]["both"], gram, rtol=1e-4, atol=1e-4)  # both are the same here


def test_statistics_of_pairs_are_of_what_both_models_read(monkeypatch):
    model = tiny.model()
    batch = tiny.batch(model.config)
    halve = lambda layer, read: (halved(layer, read), read)
    after, found = walk(model, batch, halve, {"shift": SHIFT}, mesh=MESH, sublayers=True)
    x, other = reads(after, batch, monkeypatch), reads(model, batch, monkeypatch)
    for index, read in enumerate(found):
        for path, each in read.items():
            path = f"block_{index // 4}/{path}"
            shift = x[path].T @ (other[path] - x[path])
            np.testing.assert_allclose(each["shift"], shift, rtol=1e-3, atol=1e-3, err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_layer_reads_final_states(name):
    model = tiny.model(tiny.CONFIGS[name])
    batch, calls = tiny.batch(model.config, rows=11), []

    def halve(layer, read):
        calls.append((layer.index, read))
        return halved(layer, read), None

    after, _ = walk(model, batch, halve, {"gram": GRAM, "shift": SHIFT}, mesh=MESH, output=True)
    *_, (index, read) = calls
    (path,) = read
    assert (index, path) == (None, "embedding" if model.config.tied else "unembedding")
    np.testing.assert_array_equal(after.params[path], 0.5 * model.params[path])
    whole = after.replace(
        params={**after.params, path: model.params[path]}
    )  # tokens were looked up in the table as it was
    x, other = (final_states(each, batch) for each in (whole, model))
    np.testing.assert_allclose(read[path]["gram"], x.T @ x, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(read[path]["shift"], x.T @ (other - x), rtol=1e-3, atol=1e-3)


def final_states(model, batch):
    """[n, D] of the tokens that count."""
    inputs = {"segments": batch["segments"], "positions": batch["positions"]}
    variables, counted = {"params": model.params}, batch["segments"].reshape(-1) > 0
    x, _ = Transformer(model.config).apply(variables, batch["inputs"], **inputs, method="final_states")
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])[counted]


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_outputs_are_those_of_the_products(name, monkeypatch):
    model = tiny.model(tiny.CONFIGS[name])
    batch = tiny.batch(model.config, rows=11)
    seen, x = seen_by(model, batch, {"squares": SQUARES._replace(of="outputs")}), reads(model, batch, monkeypatch)
    for path, w in trees.flatten(model.params):
        if path.endswith("kernel"):
            wanted = np.square(x[path] @ np.asarray(w, np.float64)).sum(0)
            np.testing.assert_allclose(seen[path]["squares"], wanted, rtol=1e-4, atol=1e-3)


def test_the_diagonal_of_the_fisher_information_is_that_of_each_row():
    model = tiny.model()
    batch = tiny.batch(model.config, rows=3)
    seen = seen_by(model, batch, {"fisher": FISHER, "squares": SQUARES})
    loss = language_model_loss(model.config)
    total = jax.tree.map(np.zeros_like, model.params)
    for row in range(3):
        one = {name: field[row : row + 1] for name, field in batch.items()}
        summed = lambda params, one=one: loss(params, {}, one, None)[0] * loss(params, {}, one, None)[1]["weight"]
        total = jax.tree.map(lambda t, g: t + np.square(g), total, jax.jit(jax.grad(summed))(model.params))
    for path, wanted in trees.flatten(total):
        if path.endswith("kernel"):
            np.testing.assert_allclose(seen[path]["fisher"], wanted, rtol=1e-4, atol=1e-6, err_msg=path)
            assert seen[path]["squares"].shape == wanted.shape[:1]
