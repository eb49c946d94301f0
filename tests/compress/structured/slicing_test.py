import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import api as efflm
from efflm import ops, trees
from efflm.compress.quantize import quantize
from efflm.compress.structured.slicing import features, slice_params
from efflm.config import InputError
from efflm.model import LanguageModel
from efflm.model.params import find, table
from efflm.text import tokenizer
from tests import reference, tiny

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))
KEPT = {(0, "mlp"): [40, 3, 7, 8, 20], (1, "groups"): [1], (1, "mlp"): range(0, 48, 2)}


def with_zeros(model, kept):
    """What reads the slices that go reads nothing of them."""
    params = dict(trees.flatten(model.params))
    for (layer, axis), indices in kept.items():
        path, name = {"mlp": ("feedforward/down", "mlp"), "groups": ("attention/output", "heads")}[axis]
        path = f"block_{layer}/{path}/kernel"
        rows = features(model.config.blocks[layer], {axis: list(indices)})[name]
        stays = np.isin(np.arange(params[path].shape[0]), rows)
        params[path] = jnp.where(stays[:, None], params[path], 0.0)
    return model.replace(params=trees.unflatten(params))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_model_without_some_heads_and_channels_computes_what_it_does_with_zeros_in_their_place(name):
    model = tiny.model(tiny.CONFIGS[name])
    small = slice_params(model, KEPT)
    assert [(b.heads, b.kv_heads, b.mlp_dim) for b in small.config.blocks] == [
        (4, model.config.blocks[0].kv_heads, 5), (4 // model.config.blocks[0].kv_heads, 1, 24),
    ]  # fmt: skip
    shapes = {path: leaf.shape for path, leaf in trees.flatten(small.params)}
    assert shapes == {path: param.shape for path, param in table(small.config).items()}
    np.testing.assert_allclose(tiny.logits(small, TOKENS), tiny.logits(with_zeros(model, KEPT), TOKENS), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "untied"])
def test_a_narrower_model_is_that_of_the_weights_that_are_left(name):
    model, width = tiny.model(tiny.CONFIGS[name]), [30, 1, 2, 3, 5, 8, 13, 21]
    small = slice_params(model, {(None, "width"): width})
    assert small.config.width == 8
    for path, leaf in trees.flatten(small.params):
        left = np.asarray(dict(trees.flatten(model.params))[path])
        for axis, axis_name in enumerate(find(path)[0].axes):
            left = left[(slice(None),) * axis + (width,)] if axis_name == "width" else left
        np.testing.assert_array_equal(leaf, left)
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), small.params)
    np.testing.assert_allclose(
        tiny.logits(small, TOKENS)[0], reference.forward(small.config, plain, TOKENS[0]), atol=1e-3
    )


def test_slicing_twice_is_slicing_once():
    model = tiny.model()
    first, second = [9, 2, 30, 4], [2, 0]
    twice = slice_params(slice_params(model, {(1, "mlp"): first}), {(1, "mlp"): second})
    once = slice_params(model, {(1, "mlp"): [first[i] for i in second]})
    jax.tree.map(np.testing.assert_array_equal, twice.params, once.params)
    assert twice.config == once.config


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 16)])
def test_masks_and_formats_go_along(bits, group):
    model = tiny.model()
    masks = {"block_0/feedforward/up/kernel": jnp.arange(32 * 48).reshape(32, 48) % 3 > 0}
    model = LanguageModel(model.config, ops.apply_masks(quantize(model.params, bits=bits, group=group), masks), masks)
    small, up = slice_params(model, KEPT), "block_0/feedforward/up/kernel"
    mlp = list(KEPT[0, "mlp"])
    np.testing.assert_array_equal(small.masks[up], masks[up][:, mlp])
    before, after = (dict(trees.flatten(each.params))[up] for each in (model, small))
    assert (after.bits, after.group) == (bits, group)
    np.testing.assert_array_equal(ops.dequantize(after), ops.dequantize(before)[:, mlp])


def test_it_is_stored_as_any_model(tmp_path):
    small = slice_params(tiny.model(), KEPT)
    efflm.save(tmp_path / "small", small, tokenizer.train((), tokenizer.BYTES))
    again, _ = efflm.load(tmp_path / "small")
    assert again.config.unused == ((tokenizer.BYTES, small.config.vocabulary),)
    assert dataclasses.replace(again.config, unused=()) == small.config
    np.testing.assert_array_equal(tiny.logits(again, TOKENS), tiny.logits(small, TOKENS))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({(0, "mlp"): [48]}, r"mlp of layer 0: \[48\] is out of range, the last is 47"),
        ({(0, "mlp"): []}, "no mlp of layer 0 is kept"),
        ({(0, "groups"): [1, 1]}, "groups of layer 0: an index is repeated"),
        ({(2, "mlp"): [0]}, "layer 2 is not there: the layers are 0 to 1"),
        ({(0, "width"): [0]}, "layer 0 has no axis 'width': choose from groups, mlp"),
        ({(0, "heads"): [0, 1, 2]}, "heads of layer 0 do not go alone, since each key-value head must keep as many"),
        ({(None, "heads"): [0]}, "the model has no axis 'heads': choose from width"),
    ],
)
def test_what_cannot_be_sliced_is_refused(kept, message):
    with pytest.raises(InputError, match=message):
        slice_params(tiny.model(), kept)
