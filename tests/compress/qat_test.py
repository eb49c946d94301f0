import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.plan import EMBEDDINGS, Plan
from efflm.compress.qat import QAT, rounded
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model.params import in_layer
from efflm.ops import QArray, qarray
from efflm.parallel import meshes
from tests import tiny

BATCH = tiny.batch(tiny.LLAMA.config())
CONTEXT = Context(mesh=meshes.make_mesh(), batches=lambda step: BATCH, corpus="some text")


def by_reference(w, scale, bits, group, residuals=None):
    """(values, what rounding added); residuals: what it adds, in place of rounding."""
    most, s = 2 ** (bits - 1) - 1, np.repeat(scale, group or len(w), axis=0)[: len(w)]
    clipped = np.clip(w / s, -most - 1, most)
    added = np.round(clipped) - clipped if residuals is None else residuals
    return (clipped + added) * s, added


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([8, 4, 3, 2]),
    group=st.sampled_from([0, 4, 8]),
    K=st.sampled_from([5, 8, 16]),
)
def test_values_and_gradients_are_those_of_the_paper(seed, bits, group, K):
    rng = np.random.default_rng(seed)
    group = 0 if group >= K else group
    w, toward = rng.standard_normal((2, K, 3))
    most, count = 2 ** (bits - 1) - 1, group or K
    log = rng.normal(np.log(1.5 / most), 0.3, (-(-K // count), 3))  # some weights are beyond the range
    sign = np.sign(rng.standard_normal(log.shape)).astype(np.float32)
    wanted, added = by_reference(w, sign * np.exp(log), bits, group)
    form = ops.Format(bits=bits, group=group, scale_dtype="float32")

    def total(w, log):
        return jnp.sum(rounded(w, log, sign, form) * toward)

    arrays = jnp.asarray(w, jnp.float32), jnp.asarray(log, jnp.float32)
    sure = np.abs(added) < 0.499
    np.testing.assert_allclose(np.where(sure, rounded(*arrays, sign, form), wanted), wanted, rtol=1e-4, atol=1e-5)
    found = jax.grad(total, argnums=(0, 1))(*arrays)
    step = 1e-6

    def surrogate(w, log):
        """In it rounding adds a constant; so its gradients are those that the paper defines."""
        return np.sum(by_reference(w, sign * np.exp(log), bits, group, added)[0] * toward)

    for which, (grad, share) in enumerate(zip(found, (1.0, 1 / np.sqrt(count * most)))):
        for place in zip(*(index.ravel() for index in np.indices(grad.shape))):
            ends = []
            for toward_it in (1, -1):
                moved = [w.copy(), log.copy()]
                moved[which][place] += toward_it * step
                ends.append(surrogate(*moved))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(grad[place], share * slope, rtol=2e-3, atol=2e-3)


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


def test_what_is_stored_is_what_was_trained():
    """With a rate of almost nothing the scales are those of the start, which clip; not those of the largest weight."""
    model = tiny.model()
    after, _ = QAT(bits=4, group=16, steps=1, learning_rate=1e-9, distill=False)(model, CONTEXT)
    for path, w in trees.flatten(model.params):
        if in_layer(path):
            leaf = dict(trees.flatten(after.params))[path]
            scale, _ = qarray.grid_of(w, -2, ops.Format(bits=4, group=16, clip=True))
            np.testing.assert_allclose(qarray.scales(leaf), scale, rtol=1e-3)
            wanted = rounded(w, jnp.log(jnp.abs(scale)), jnp.sign(scale), ops.Format(bits=4, group=16))
            assert np.mean(~np.isclose(ops.dequantize(leaf), wanted, rtol=1e-4, atol=1e-6)) < 0.01


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
    for wrong in ({"steps": 0}, {"bits": 5}, {"learning_rate": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            QAT(**wrong)
    with pytest.raises(InputError, match="needs text to train on"):
        recipe.apply(tiny.model(), (QAT(),), Context(mesh=meshes.make_mesh()))
    with pytest.raises(InputError, match="needs a teacher"):
        QAT()(tiny.model(), CONTEXT)
