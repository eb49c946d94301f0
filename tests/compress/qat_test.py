import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.plan import EMBEDDINGS, Plan
from efflm.compress.qat import QAT
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model.params import in_layer
from efflm.ops import QArray, qarray
from efflm.parallel import meshes
from tests import tiny

BATCH = tiny.batch(tiny.LLAMA.config())
CONTEXT = Context(mesh=meshes.make_mesh(), batches=lambda step: BATCH, corpus="some text")


def divergence(model, after):
    """The mean KL divergence of the next token, from the model, where there is text."""
    inputs = {"segments": BATCH["segments"], "positions": BATCH["positions"]}
    p, q = (
        jax.nn.log_softmax(tiny.logits(each, BATCH["inputs"], **inputs).astype(jnp.float32)) for each in (model, after)
    )
    return float(jnp.sum(jnp.exp(p) * (p - q), axis=-1)[BATCH["segments"] > 0].mean())


@pytest.mark.parametrize("scales", ["learned", "running"])
def test_a_trained_model_is_nearer_to_the_teacher_than_the_nearest_codes(scales):
    model = tiny.model()
    step = QAT(bits=3, group=16, scales=scales, steps=25, learning_rate=2e-3, embeddings=0)
    after, (record,) = recipe.apply(model, (step,), CONTEXT)
    nearest, _ = Quantize(bits=3, group=16, clip=True, embeddings=0)(model, CONTEXT)
    assert divergence(model, after) < 0.6 * divergence(model, nearest)
    for path, leaf in trees.flatten(after.params):
        assert isinstance(leaf, QArray) == in_layer(path), path
        if in_layer(path):
            assert np.abs(np.asarray(qarray.codes(leaf)) + 0.5).max() <= 3.5
    assert record.corpus == "some text"
    assert set(record.leaves) == {path for path, _ in trees.flatten(after.params)}


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_a_rate_of_almost_nothing_the_grid_stays(symmetric):
    """That of the start, whose ranges are searched, and that of a matrix which has the format already."""
    form = ops.Format(bits=3, group=16, symmetric=symmetric, clip=True)
    step = QAT(plan=Plan((("layers", form),)), steps=1, learning_rate=1e-9, distill=False)
    nearest, _ = Quantize(plan=step.plan)(tiny.model(), CONTEXT)
    other = nearest.replace(params=jax.tree.map(lambda w: w * 2 if w.dtype == jnp.float16 else w, nearest.params))
    for begin, wanted in ((tiny.model(), nearest), (other, other)):
        after = dict(trees.flatten(step(begin, CONTEXT)[0].params))
        for path, leaf in trees.flatten(wanted.params):
            if in_layer(path):
                np.testing.assert_array_equal(after[path].scale, leaf.scale)
                assert np.mean(qarray.codes(after[path]) != qarray.codes(leaf)) < 0.01
                assert (leaf.zeros is None) == symmetric


@pytest.mark.parametrize("scales", ["learned", "running"])
def test_dropped_weights_stay_zero_and_other_formats_stay(scales):
    steps = (
        *grammar.chain("magnitude50"),
        Quantize(plan=Plan(((EMBEDDINGS, ops.Format(bits=4)),))),
        QAT(group=16, scales=scales, steps=3, learning_rate=0.1),
    )
    after, _ = recipe.apply(tiny.model(), steps, CONTEXT)
    weights = dict(trees.flatten(after.params))
    assert weights["embedding"].bits == 4
    for path, mask in after.masks.items():
        assert (np.asarray(ops.dequantize(weights[path]))[~np.asarray(mask)] == 0).all(), path


def test_on_a_mesh_it_trains():
    mesh = meshes.make_mesh(data=2, fsdp=2)
    after, _ = QAT(group=16, steps=2, distill=False)(tiny.model(), dataclasses.replace(CONTEXT, mesh=mesh))
    one, _ = QAT(group=16, steps=2, distill=False)(tiny.model(), CONTEXT)
    found, wanted = (
        qarray.scales(dict(trees.flatten(each.params))["block_0/attention/query/kernel"]) for each in (after, one)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_settings_that_cannot_be():
    for wrong in ({"steps": 0}, {"bits": 9}, {"learning_rate": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            QAT(**wrong)
    with pytest.raises(InputError, match="needs text to train on"):
        recipe.apply(tiny.model(), (QAT(),), Context(mesh=meshes.make_mesh()))
    with pytest.raises(InputError, match="needs a teacher"):
        QAT()(tiny.model(), CONTEXT)
