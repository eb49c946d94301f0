"""The record that each step leaves: what it looks at of the models, and how often."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress.magnitude import magnitude_masks
from efflm.compress.quantize import Cast, quantize
from efflm.compress.step import Context, digest, record
from efflm.formats import efflm_file
from efflm.model import LanguageModel, placement
from efflm.parallel import meshes
from tests import tiny

MESH = meshes.make_mesh(data=2, fsdp=2, tensor=2)


def changed(model):
    up = model.params["block_0"]["feedforward"]["up"]["kernel"]
    block = model.params["block_0"] | {
        "feedforward": model.params["block_0"]["feedforward"] | {"up": {"kernel": up + 1}}
    }
    return model.replace(params=model.params | {"block_0": block})


def test_a_record_fetches_each_array_of_the_model_once(monkeypatch):
    """The digest needs their bytes. Sizes and differences are taken where the arrays are, on accelerators at least."""
    fetched = collections.Counter()
    on_host, on_cpu = trees.on_host, trees._here
    before = tiny.model()
    after = changed(before)
    names = {id(leaf): path for path, leaf in trees.flatten({"before": before.params, "after": after.params})}

    def counted(leaf):
        if id(leaf) in names:
            fetched[names[id(leaf)]] += 1
        else:
            assert leaf.ndim < 2  # counts of the rows of an array
        return on_host(leaf)

    monkeypatch.setattr(trees, "on_host", counted)
    monkeypatch.setattr(trees, "_here", lambda leaf: None if isinstance(leaf, jax.Array) else on_cpu(leaf))
    made = record(Cast(), before, after, Context(mesh=MESH))
    assert made.leaves == ("block_0/feedforward/up/kernel",)
    assert set(fetched.values()) == {1}
    assert len(fetched) == len(trees.flatten(before.params))


def test_what_is_recorded_and_written_of_a_spread_model_is_that_of_one_on_one_device(tmp_path):
    model = tiny.model()
    masks = magnitude_masks(model.params, 0.5)
    for params, kept in (
        (model.params, None),
        (quantize(model.params), None),
        (ops.apply_masks(model.params, masks), masks),
    ):
        alone = LanguageModel(model.config, params, kept)
        spread = jax.tree.map(jax.device_put, params, placement.shardings(params, MESH))
        laid = {path: jax.device_put(mask, jax.NamedSharding(MESH, jax.P())) for path, mask in (kept or {}).items()}
        spread = LanguageModel(model.config, spread, laid or None)
        assert digest(spread) == digest(alone)
        assert ops.stored_nbytes(spread.params, spread.masks) == ops.stored_nbytes(alone.params, alone.masks)
        for name, each in (("a", alone), ("b", spread)):
            efflm_file.save(tmp_path / name, each, {})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_dtype_is_a_change():
    model = tiny.model()
    one = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    exact = jax.tree.map(lambda w: w.astype(jnp.float32), one)
    made = record(Cast(), model.replace(params=exact), model.replace(params=one), Context(mesh=MESH))
    assert len(made.leaves) == len(trees.flatten(model.params))
    assert np.isclose(made.predicted_bytes, trees.nbytes(exact) / 2)
