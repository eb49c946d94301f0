import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import calibrate, obs, recipe
from efflm.compress.adapt import Adapt, Merge
from efflm.compress.correct import Correct, correction
from efflm.compress.gptq import GPTQ
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.rotate import Rotate
from efflm.compress.smoothquant import SmoothQuant
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.model.params import in_layer
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import seen_by

CONFIG = tiny.LLAMA.config()
CONTEXT = Context(
    mesh=meshes.make_mesh(), batches=lambda step: tiny.batch(CONFIG), calibration=tiny.batch(CONFIG, rows=16)
)
THREE = GPTQ(bits=3, group=8, embeddings=0)


def test_it_is_the_best_of_its_rank_for_what_is_read():
    """In float64 by the eigenvectors of X^T X, as the paper has it."""
    rng = np.random.default_rng(0)
    x, error = rng.standard_normal((50, 12)) * np.geomspace(10, 0.1, 12), rng.standard_normal((12, 9))
    gram = x.T @ x
    damped = gram + 0.01 * np.trace(gram) / 12 * np.eye(12)
    a, b = correction(jnp.float32(error), obs.inverse(jnp.float32(gram), 0.01, "it"), 4)
    assert (a.shape, b.shape) == ((12, 4), (4, 9))
    values, vectors = np.linalg.eigh(damped)
    root = np.sqrt(values)[:, None] * vectors.T
    left, parts, right = np.linalg.svd(root @ error)
    best = vectors / np.sqrt(values) @ (left[:, :4] * parts[:4] @ right[:4])
    np.testing.assert_allclose(a @ b, best, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(root @ (error - a @ b)), np.linalg.norm(parts[4:]), rtol=1e-4)


@pytest.fixture(scope="module")
def made():
    """A model, in 3 bits, and corrected."""
    model = tiny.model()
    rounded, _ = recipe.apply(model, (THREE,), CONTEXT)
    after, records = recipe.apply(model, (THREE, Correct(rank=6)), CONTEXT)
    return model, rounded, after, records


def test_matrices_give_less_error_on_what_they_read(made):
    model, rounded, after, _ = made
    gram = seen_by(after, CONTEXT.calibration, {"gram": calibrate.GRAM})
    flat = [dict(trees.flatten(each.params)) for each in (model, rounded, after)]
    for path in gram:
        lost = [flat[0][path] - ops.in_float32(each[path]) for each in flat[1:]]
        before, now = (float(jnp.sum(each * (gram[path]["gram"] @ each))) for each in lost)
        assert now < 0.7 * before, path
    tokens = tiny.tokens(CONFIG, 4, 16)
    wanted = tiny.logits(model, tokens)
    lost = [np.square(tiny.logits(each, tokens) - wanted).mean() for each in (rounded, after)]
    assert lost[1] < 0.85 * lost[0]


def test_codes_stay_and_bytes_are_as_predicted(made, tmp_path):
    _, rounded, after, records = made
    for path, leaf in trees.flatten(rounded.params):
        found = dict(trees.flatten(after.params))[path]
        assert isinstance(found, ops.LowRank) == in_layer(path)
        if in_layer(path):
            np.testing.assert_array_equal(found.base.values, leaf.values)
            assert {found.a.dtype, found.b.dtype} == {jnp.dtype("float16")}
    size = efflm_file.save(tmp_path / "m.safetensors", after, {}, records)
    assert records[-1].predicted_bytes == pytest.approx(size, rel=0.01, abs=65536)
    tokens = tiny.tokens(CONFIG, 2, 8)
    again, _ = efflm_file.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(tiny.logits(again, tokens), tiny.logits(after, tokens))


def test_adapters_go_on_from_it(made):
    _, _, after, _ = made
    step = Adapt(rank=2, steps=1, learning_rate=1e-4, weight=0.0)
    trained, _ = recipe.apply(after, (step,), CONTEXT)
    for path, leaf in trees.select(trained.params, "kernel"):
        assert leaf.a.shape[1] == 6
        np.testing.assert_allclose(leaf.a, dict(trees.flatten(after.params))[path].a, atol=1e-3)
    merged, _ = recipe.apply(after, (Merge(),), CONTEXT)
    assert not any(isinstance(leaf, ops.LowRank) for _, leaf in trees.flatten(merged.params))


def test_on_two_devices_it_is_the_same(made):
    _, rounded, after, _ = made
    context = dataclasses.replace(CONTEXT, mesh=meshes.make_mesh(data=2), teacher=made[0])
    spread, _ = Correct(rank=6)(rounded, context)
    for path, leaf in trees.select(spread.params, "kernel"):
        np.testing.assert_allclose(
            ops.dequantize(leaf), ops.dequantize(dict(trees.flatten(after.params))[path]), atol=2e-3
        )


def test_what_cannot_be_corrected_is_refused(made):
    model, rounded, _, _ = made
    for between in (Rotate(), SmoothQuant()):
        with pytest.raises(InputError, match=r"is not the teacher's: .* nothing may come between"):
            recipe.apply(model, (between, Quantize(), Correct()), CONTEXT)
    with pytest.raises(InputError, match="the model is pruned"):
        recipe.apply(model, (Magnitude(sparsity=0.5), Correct()), CONTEXT)
    with pytest.raises(InputError, match="rank is 17, but block_0/attention/key/kernel has the shape"):
        Correct(rank=17)(rounded, dataclasses.replace(CONTEXT, teacher=model))
    with pytest.raises(InputError, match="changed nothing"):
        recipe.apply(model, (Correct(),), CONTEXT)
    with pytest.raises(InputError, match=r"set context\.teacher"):
        Correct()(rounded, CONTEXT)
    with pytest.raises(InputError, match="rank is 0"):
        Correct(rank=0)
