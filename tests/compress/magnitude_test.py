import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm import trees
from efflm.compress.finetune import Finetune
from efflm.compress.magnitude import Magnitude, magnitude_masks
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.structured.depth import Depth
from efflm.config import InputError
from efflm.ops import apply_masks, dequantize
from efflm.ops.qarray import codes
from efflm.parallel import meshes
from tests import tiny

CONTEXT = Context(mesh=meshes.make_mesh(), batches=lambda step: tiny.batch(tiny.LLAMA.config(), seed=step))
PATHS = ("block_0/attention/query/kernel", "block_0/feedforward/up/kernel")


def tree(a, b):
    return trees.unflatten(dict(zip(PATHS, (jnp.asarray(a), jnp.asarray(b)))))


# Few distinct magnitudes, so that ties are everywhere.
TIED = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(-2, 3, (8, 6)).astype(np.float32)
)


@given(TIED, TIED, st.floats(0, 0.99))
def test_counts_are_exact_under_ties(a, b, sparsity):
    layer = magnitude_masks(tree(a, b), sparsity)
    for path, w in zip(PATHS, (a, b)):
        mask = np.asarray(layer[path])
        assert (~mask).sum() == round(sparsity * 48)
        if mask.any() and not mask.all():
            assert np.abs(w[~mask]).max() <= np.abs(w[mask]).min()
    everything = magnitude_masks(tree(a, b), sparsity, "global")
    assert sum(int((~everything[path]).sum()) for path in PATHS) == round(sparsity * 96)
    dropped = [np.abs(w)[~np.asarray(everything[path])] for path, w in zip(PATHS, (a, b))]
    kept = [np.abs(w)[np.asarray(everything[path])] for path, w in zip(PATHS, (a, b))]
    assert np.max(np.concatenate(dropped), initial=0) <= np.min(np.concatenate(kept), initial=9)


@given(TIED, TIED)
def test_two_of_four_inputs_stay_and_are_the_largest(a, b):
    masks = magnitude_masks(tree(a, b), 0.5, "2:4")
    for path, w in zip(PATHS, (a, b)):
        groups, kept = np.abs(w).reshape(2, 4, 6), np.asarray(masks[path]).reshape(2, 4, 6)
        np.testing.assert_array_equal(kept.sum(axis=1), 2)
        smallest_kept = np.where(kept, groups, 9).min(axis=1)
        assert np.all(np.where(kept, 0, groups).max(axis=1) <= smallest_kept)


def test_only_matrices_in_the_layers_are_pruned():
    model = tiny.model()
    after, record = Magnitude(sparsity=0.5)(model, CONTEXT)
    for path, leaf in trees.flatten(after.params):
        zeros = int(jnp.sum(leaf == 0))
        assert zeros == (leaf.size // 2 if path in record.leaves else 0), path
    assert len(record.leaves) == 7 * 2


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(InputError, match=r"sparsity is .* \[0, 1\)"):
        Magnitude(sparsity=sparsity)


def test_pruning_and_quantizing_keep_each_others_work():
    pruned, _ = Magnitude(sparsity=0.5)(tiny.model(), CONTEXT)
    both, _ = Quantize()(pruned, CONTEXT)
    for path, w in trees.select(pruned.params, "kernel"):
        values = np.asarray(dict(trees.flatten(both.params))[path].values)
        assert np.all(values[np.asarray(w) == 0] == 0)
    eight, _ = Quantize()(tiny.model(), CONTEXT)
    masks = magnitude_masks(eight.params, 0.5)
    other_order = apply_masks(eight.params, masks)
    for path, mask in masks.items():
        leaf = dict(trees.flatten(other_order))[path]
        np.testing.assert_array_equal(dequantize(leaf)[~np.asarray(mask)], 0)


@pytest.mark.parametrize("steps", [(Magnitude(sparsity=0.5),), (Magnitude(sparsity=0.5, scope="2:4"), Quantize())])
def test_training_moves_weights_but_none_that_is_pruned(steps):
    model = tiny.model()
    for step in steps:
        model, _ = step(model, CONTEXT)
    after, _ = Finetune(steps=3, learning_rate=1e-2)(model, CONTEXT)
    before = {path: np.asarray(dequantize(w)) for path, w in trees.select(model.params, "kernel")}
    moved = {path: np.asarray(dequantize(w)) for path, w in trees.select(after.params, "kernel")}
    for path, w in before.items():
        np.testing.assert_array_equal(moved[path][~np.asarray(model.masks[path])], 0)
        assert np.any(moved[path] != w), path
    assert [type(w) for _, w in trees.flatten(after.params)] == [type(w) for _, w in trees.flatten(model.params)]
    jax.tree.map(np.testing.assert_array_equal, after.masks, model.masks)


def test_weights_that_rounded_to_zero_are_trained_on():
    """A zero that no mask names is a weight like any other: rounding is no pruning."""
    model = tiny.model()
    model, _ = Quantize()(model, CONTEXT)
    assert model.masks is None
    after, _ = Finetune(steps=4, learning_rate=3e-2)(model, CONTEXT)
    before, moved = (
        np.concatenate([np.asarray(codes(w)).ravel() for _, w in trees.select(each.params, "kernel")])
        for each in (model, after)
    )
    zeros = before == 0
    assert zeros.sum() > 100
    assert np.mean(moved[zeros] != 0) > 0.5


def test_pruning_again_keeps_what_was_pruned_before():
    once, _ = Magnitude(sparsity=0.3)(tiny.model(), CONTEXT)
    twice, _ = Magnitude(sparsity=0.5, scope="2:4")(once, CONTEXT)
    for path, mask in twice.masks.items():
        assert not np.any(mask & ~once.masks[path])
        assert np.all(np.asarray(dict(trees.flatten(twice.params))[path])[~np.asarray(mask)] == 0)


def test_masks_follow_their_layers():
    pruned, _ = Magnitude(sparsity=0.5)(tiny.model(dataclasses.replace(tiny.LLAMA, layers=3)), CONTEXT)
    half, _ = Depth(layers=2)(pruned, CONTEXT)
    assert half.masks.keys() == {path for path in pruned.masks if not path.startswith("block_2")}
    path = "attention/query/kernel"
    np.testing.assert_array_equal(half.masks[f"block_1/{path}"], pruned.masks[f"block_2/{path}"])
    fresh, _ = Depth(layers=2, init="random")(pruned, CONTEXT)
    assert fresh.masks is None
