import numpy as np
import pytest

from efflm import trees
from efflm.compress.structured.importance import READERS, largest, measured, taylor
from efflm.compress.structured.slicing import features
from efflm.config import InputError
from efflm.parallel import meshes
from tests import reference, tiny

MODEL = tiny.model(seed=3)
CONFIG, MESH = MODEL.config, meshes.make_mesh()
BATCH = tiny.batch(CONFIG, rows=2, length=12)
AXES = ("groups", "mlp")


def with_gate(layer, axis, index, gate):
    """The weights of the model, those that read a slice multiplied by a gate."""
    path, name = READERS[axis]
    rows = features(CONFIG.blocks[layer], {axis: [index]})[name]
    flat = {path: np.float64(leaf) for path, leaf in trees.flatten(MODEL.params)}
    flat[f"block_{layer}/{path}"][rows] *= gate
    return trees.unflatten(flat)


def documents(row):
    return [np.nonzero(BATCH["segments"][row] == which)[0] for which in (1, 2)]


def loss(params, row):
    total = 0.0
    for tokens in documents(row):
        logits = reference.forward(CONFIG, params, BATCH["inputs"][row][tokens])
        shifted = logits - logits.max(1, keepdims=True)
        chosen = shifted[np.arange(len(tokens)), BATCH["targets"][row][tokens]]
        total += (np.log(np.exp(shifted).sum(1)) - chosen).sum()
    return total


def test_taylor_is_the_derivative_by_a_gate_of_each_slice_of_each_row():
    found = taylor(MODEL, BATCH, MESH, AXES)
    for layer, axis, index in ((0, "groups", 1), (1, "groups", 0), (0, "mlp", 5), (1, "mlp", 47)):
        change, h = 0.0, 1e-5
        for row in range(2):
            up, down = (loss(with_gate(layer, axis, index, gate), row) for gate in (1 + h, 1 - h))
            change += abs((up - down) / (2 * h))
        np.testing.assert_allclose(found[layer, axis][index], change, rtol=2e-3, atol=1e-5)


def test_on_a_mesh_taylor_is_the_same():
    alone = taylor(MODEL, BATCH, MESH, ("mlp",))
    spread = taylor(MODEL, BATCH, meshes.make_mesh(data=2, fsdp=2, tensor=2), ("mlp",))
    for key, each in alone.items():
        np.testing.assert_allclose(spread[key], each, rtol=1e-3, atol=1e-5)


def test_by_output_it_is_the_share_of_the_layers_output_that_a_channel_adds():
    found = measured(MODEL, BATCH, MESH, AXES, "output")
    for layer, index in ((0, 5), (1, 0)):
        added, energy = 0.0, 0.0
        for row in range(2):
            for tokens in documents(row):
                ids = BATCH["inputs"][row][tokens]
                without, whole = (
                    reference.streams(CONFIG, with_gate(layer, "mlp", index, gate), ids)[layer + 1] for gate in (0, 1)
                )
                added, energy = added + np.square(whole - without).sum(), energy + np.square(whole).sum()
        np.testing.assert_allclose(found[layer, "mlp"][index], added / energy, rtol=1e-3)
    assert found[0, "groups"].shape == (2,)


def test_the_largest_are_taken_in_order_and_of_equals_the_first():
    assert largest(np.array([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]


def test_without_text_it_is_refused():
    with pytest.raises(InputError, match="Taylor importance needs calibration text: give a corpus"):
        taylor(MODEL, None, MESH, AXES)
