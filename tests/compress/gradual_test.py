import dataclasses

import jax
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.gradual import Gradual
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context, trains
from efflm.config import InputError
from efflm.model import placement
from efflm.model.params import in_layer
from efflm.parallel import meshes
from efflm.train import metrics, optimizer
from tests import tiny

STEP = Gradual(sparsity=0.6, steps=8, every=2, ramp=0.5, learning_rate=1e-2)


def context(mesh=None):
    batches = lambda step: tiny.batch(tiny.LLAMA.config(), seed=step)
    return Context(mesh=mesh or meshes.make_mesh(), batches=batches, corpus="some text")


def floats(model):
    return {path: np.asarray(ops.dequantize(w)) for path, w in trees.flatten(model.params)}


def require_pruned(model, sparsity, exactly=True):
    weights = floats(model)
    assert model.masks.keys() == {path for path in weights if in_layer(path)}
    for path, mask in model.masks.items():
        mask, w = np.asarray(mask), weights[path]
        assert (~mask).sum() == round(sparsity * mask.size), path
        assert np.all(w[~mask] == 0), path
        assert not exactly or np.all(w[mask] != 0), path


def test_half_of_each_matrix_is_zero_and_masked():
    model = tiny.model()
    after, record = STEP(model, context())
    require_pruned(after, 0.6)
    assert record.corpus == "some text"
    assert record.predicted_bytes == ops.stored_nbytes(after.params, after.masks)
    small = ops.stored_nbytes(model.params)
    assert record.predicted_bytes < 0.75 * small
    trained = floats(after)["embedding"]
    assert np.all(trained != floats(model)["embedding"])
    later, _ = Quantize(bits=8)(after, context())
    require_pruned(later, 0.6, exactly=False)


def test_it_trains_a_quantized_model_and_what_was_pruned_stays_so():
    model, _ = recipe.apply(tiny.model(), (Magnitude(sparsity=0.3), Quantize(bits=4, group=16)), context())
    after, _ = STEP(model, context())
    require_pruned(after, 0.6, exactly=False)
    for path, mask in model.masks.items():
        assert not np.any(np.asarray(after.masks[path])[~np.asarray(mask)]), path
    assert {w.bits for path, w in trees.flatten(after.params) if in_layer(path)} == {4}


def test_its_metrics_say_the_learning_rate(tmp_path):
    STEP(tiny.model(), dataclasses.replace(context(), metrics=tmp_path / "gradual.jsonl"))
    _, rates = metrics.curve(tmp_path / "gradual.jsonl", "learning_rate")
    step = STEP.steps - 1
    np.testing.assert_allclose(rates[-1], optimizer.rate(STEP)(step), rtol=1e-6)


def test_a_sparser_model_stays_as_sparse():
    model, _ = Magnitude(sparsity=0.8)(tiny.model(), context())
    after, _ = STEP(model, context())
    require_pruned(after, 0.8)


def test_sharded_equals_unsharded():
    mesh = meshes.make_mesh(data=2)
    model = tiny.model()
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    one, _ = STEP(model, context())
    two, _ = STEP(spread, context(mesh))
    require_pruned(two, 0.6)
    ours, theirs = floats(two), floats(one)
    for path in ours:
        same = (ours[path] == 0) == (theirs[path] == 0)
        assert same.mean() > 0.99, path
        np.testing.assert_allclose(ours[path][same], theirs[path][same], rtol=1e-2, atol=1e-3, err_msg=path)


def test_the_recipe_and_settings_that_cannot_be():
    assert trains(grammar.chain("gradual50"))
    with pytest.raises(InputError, match="sparsity is 1"):
        Gradual(sparsity=1.0)
    with pytest.raises(InputError, match="ramp is 0"):
        Gradual(ramp=0.0)
    with pytest.raises(InputError, match="every is 0"):
        Gradual(every=0)
    with pytest.raises(InputError, match="last time after 10 steps, but there are only 10"):
        Gradual(steps=10)
    with pytest.raises(InputError, match="needs text"):
        STEP(tiny.model(), Context(mesh=meshes.make_mesh()))
