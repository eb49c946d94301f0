import dataclasses
import json

import jax
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import recipe
from efflm.compress.adapt import Adapt, Merge
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.model import placement
from efflm.parallel import meshes, sharding
from efflm.train import trainer
from tests import tiny

CONFIG, FOUR = tiny.LLAMA.config(), Quantize(bits=4, group=8, embeddings=0)
TOKENS = tiny.tokens(CONFIG, 2, 8)
STEP = Adapt(rank=4, steps=30, learning_rate=1e-2, weight=0.0)


def context(mesh=None, **rest):
    batch = tiny.batch(CONFIG)
    return Context(mesh=mesh or meshes.make_mesh(), batches=lambda step: batch, **rest)


def quantized(model=None):
    return recipe.apply(model or tiny.model(), (FOUR,), context())[0]


def losses(file):
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """A model in 4 bits with adapters, its record and the losses on the way."""
    file = tmp_path_factory.mktemp("adapt") / "metrics.jsonl"
    after, record = STEP(quantized(), context(metrics=file))
    return after, record, losses(file)


def test_adapters_learn_beside_a_base_that_stays(recovered):
    after, record, losses = recovered
    assert losses[-1] < 0.9 * losses[0]
    before = dict(trees.flatten(quantized().params))
    for path, leaf in trees.flatten(after.params):
        base = leaf.base if isinstance(leaf, ops.LowRank) else leaf
        for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(before[path]), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(record.leaves) == 14
    assert all(dict(trees.flatten(after.params))[path].a.shape[-1] == 4 for path in record.leaves)


def test_only_adapters_have_a_state(monkeypatch):
    seen, fit = [], trainer.fit

    def spy(task, **named):
        seen.append((trees.count(jax.eval_shape(task.start)), trees.nbytes(task.frozen["model"])))
        return fit(task, **named)

    monkeypatch.setattr(trainer, "fit", spy)
    dataclasses.replace(STEP, steps=1)(quantized(), context())
    sizes = {"query": (32, 32), "key": (32, 16), "value": (32, 16), "output": (32, 32), "up": (32, 48)}
    expected = 2 * (sum(4 * (K + N) for K, N in sizes.values()) + 2 * 4 * (32 + 48))
    assert seen == [(expected, trees.nbytes(quantized().params))]


def test_what_is_saved_is_what_was_made(recovered, tmp_path):
    after, record, _ = recovered
    size = efflm_file.save(tmp_path / "m.safetensors", after, {}, [record])
    assert record.predicted_bytes == pytest.approx(size, rel=0.01, abs=65536)
    again, _ = efflm_file.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(tiny.logits(again, TOKENS), tiny.logits(after, TOKENS))
    prepared = ops.prepare(after, jax.default_backend())
    np.testing.assert_allclose(tiny.logits(prepared, TOKENS), tiny.logits(after, TOKENS), atol=1e-3)


@pytest.mark.parametrize("base", ["float", "int4"])
def test_a_merged_model_is_the_one_that_was_trained(base, tmp_path):
    model, file = (tiny.model() if base == "float" else quantized()), tmp_path / "metrics.jsonl"
    step = dataclasses.replace(STEP, merge=True)
    after, _ = step(model, context(metrics=file))
    assert jax.tree.structure(after.params) == jax.tree.structure(model.params)
    told = losses(file)
    assert told[-1] < 0.95 * told[0]
    _, more = tmp_path / "again", tmp_path / "again.jsonl"
    dataclasses.replace(STEP, steps=1)(after, context(metrics=more))
    assert losses(more)[0] < told[-1] * 1.02  # the merged model's own loss


def test_merging_afterwards_keeps_the_format_and_is_asked_for(recovered):
    after = recovered[0]
    merged, _ = recipe.apply(after, (Merge(),), context())
    assert jax.tree.structure(merged.params) == jax.tree.structure(quantized().params)
    gap = np.abs(np.asarray(tiny.logits(merged, TOKENS)) - np.asarray(tiny.logits(after, TOKENS)))
    assert 0 < gap.max() < 0.5 * np.abs(tiny.logits(after, TOKENS)).max()
    with pytest.raises(InputError, match="has an adapter beside it, which Magnitude cannot change: merge it first"):
        recipe.apply(after, (Magnitude(sparsity=0.5),), context())


def test_zeros_of_a_pruned_model_stay():
    pruned = Magnitude(sparsity=0.5)(tiny.model(), context())[0]
    with pytest.raises(InputError, match=r"would fill their zeros: set adapt\.merge"):
        STEP(pruned, context())
    after, _ = dataclasses.replace(STEP, steps=3, merge=True)(pruned, context())
    for path, mask in after.masks.items():
        assert not np.any(np.asarray(dict(trees.flatten(after.params))[path])[~np.asarray(mask)])


def test_on_four_devices_as_on_one_and_towards_a_teacher():
    step = dataclasses.replace(STEP, steps=3, weight=0.5)
    made = []
    for mesh in (meshes.make_mesh(), meshes.make_mesh(fsdp=2, tensor=2)):
        model = quantized()
        model = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
        made.append(step(model, context(mesh, teacher=tiny.model()))[0])
    one, four = (jax.device_get(tiny.logits(sharding.on_one_device(each), TOKENS)) for each in made)
    np.testing.assert_allclose(four, one, rtol=1e-2, atol=2e-3)


def test_bad_settings_are_refused():
    for fields, words in (({"rank": 0}, "rank is 0"), ({"weight": 1.5}, "weight is 1.5"), ({"steps": 0}, "steps is 0")):
        with pytest.raises(InputError, match=words):
            Adapt(**fields)
    with pytest.raises(InputError, match=r"rank is 17, but block_0/attention/key/kernel has the shape \(32, 16\)"):
        Adapt(rank=17, weight=0)(tiny.model(), context())
