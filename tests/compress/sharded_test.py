"""Compressed on eight devices, a model is the one that is compressed on one, and lies as the table says."""

import jax
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.step import Context, trains
from efflm.model import LanguageModel, placement
from efflm.parallel import meshes
from tests import tiny

MESH = meshes.make_mesh(data=2, fsdp=2, tensor=2)
SHORT = {Finetune: {"steps": 3}, Distill: {"steps": 3}}


def context(mesh):
    return Context(mesh=mesh, batches=lambda step: tiny.batch(tiny.LLAMA.config(), seed=step))


@pytest.mark.parametrize("name", ["w8a8", "magnitude50_global", "magnitude24", "shrink_distill_int8"])
def test_sharded_equals_unsharded(name):
    steps = grammar.chain(name)
    steps, model = recipe.override(steps, SHORT), tiny.model()
    spread = LanguageModel(model.config, jax.device_put(model.params, placement.shardings(model.params, MESH)))
    expected, _ = recipe.apply(model, steps, context(meshes.make_mesh()))
    after, records = recipe.apply(spread, steps, context(MESH))
    assert after.config == expected.config
    assert records[-1].predicted_bytes == ops.stored_nbytes(expected.params, expected.masks)
    want = dict(trees.flatten(expected.params, inside=True))
    where = dict(trees.flatten(placement.shardings(after.params, MESH), inside=True))
    for path, leaf in trees.flatten(after.params, inside=True):
        assert leaf.sharding.is_equivalent_to(where[path], leaf.ndim), path
        ours, theirs = np.asarray(leaf, np.float32), np.asarray(want[path], np.float32)
        if not trains(steps):
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
        elif leaf.dtype == np.int8:
            assert np.abs(ours - theirs).max() <= 1, path  # a value at the middle of two may fall to either
            assert np.mean(ours != theirs) < 0.01, path
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5, err_msg=path)
            np.testing.assert_array_equal(ours == 0, theirs == 0, err_msg=path)
