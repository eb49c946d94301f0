import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.compress import recipe
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.structured import allocation, slicing
from efflm.compress.structured.allocation import counts
from efflm.compress.structured.importance import scores
from efflm.compress.structured.width import Width, refit
from efflm.config import InputError
from efflm.ops import QArray
from efflm.parallel import meshes, sharding
from tests import tiny

CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16))


def logits(model):
    batch = CONTEXT.calibration
    found = tiny.logits(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"])
    return np.asarray(found)[batch["segments"] > 0]


def test_scores_are_what_each_input_adds(rng):
    x, w = rng.standard_normal((40, 6)), rng.standard_normal((6, 5))
    squares = jnp.asarray(np.square(x).sum(0), jnp.float32)
    added = [np.square(np.outer(x[:, k], w[k])).sum() for k in range(6)]
    np.testing.assert_allclose(scores(jnp.asarray(w, jnp.float32), squares, "output"), added, rtol=1e-4)
    np.testing.assert_allclose(
        scores(jnp.asarray(w, jnp.float32), squares, "activation"), np.square(x).sum(0), rtol=1e-4
    )
    np.testing.assert_allclose(
        scores(jnp.asarray(w, jnp.float32), squares, "magnitude"), np.square(w).sum(1), rtol=1e-4
    )


def test_the_rows_that_stay_are_the_least_squares_solution(rng):
    x = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8))
    w, kept, gone = rng.standard_normal((8, 5)), np.array([0, 2, 3, 6, 7]), np.array([1, 4, 5])
    expected = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    found = refit(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), kept, gone, 1e-7)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_inputs_that_are_always_zero_change_nothing():
    w = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(refit(w, jnp.zeros((4, 4)), np.array([1, 2]), np.array([0, 3]), 0.01), w[1:3])


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_it_removes_the_share_that_was_asked_for(name):
    model = tiny.model(tiny.CONFIGS[name])
    after, record = Width(parameters=0.2)(model, CONTEXT)
    total = trees.count(model.params)
    channel = 2 * 3 * 33  # parameters of one channel of the feed-forward part, in both layers
    assert abs(trees.count(after.params) - 0.8 * total) <= channel
    assert record.predicted_bytes == trees.nbytes(after.params)


@pytest.mark.parametrize("name", tiny.and_combinations(tiny.CONFIGS, ("gpt2", "qwen3")))
@pytest.mark.parametrize("axes", ["groups", "mlp"])
def test_the_outputs_are_nearer_where_the_rest_is_fitted_again(name, axes):
    model = tiny.model(tiny.CONFIGS[name])
    share = 0.14 if name == "qwen3" else 0.08  # at least a group of heads, which are large there
    step = Width(parameters=share, axes=axes)
    lost = [
        np.square(logits(dataclasses.replace(step, refit=fits)(model, CONTEXT)[0]) - logits(model)).mean()
        for fits in (True, False)
    ]
    assert lost[0] < 0.9 * lost[1]


def test_channels_that_do_nothing_go_first_and_cost_nothing():
    model = tiny.model()
    dead = {f"block_{i}/feedforward/down/kernel": slice(None, 30 + i) for i in range(2)}
    kill = lambda path, w: w.at[dead[path]].set(0.0) if path in dead else w
    model = model.replace(params=trees.map_with_path(kill, model.params))
    share = 30 * 96 * 2 / trees.count(model.params)
    after, _ = Width(parameters=share, axes="mlp")(model, CONTEXT)
    assert [block.mlp_dim for block in after.config.blocks] == [18, 18]
    np.testing.assert_allclose(logits(after), logits(model), atol=2e-3)


def test_many_channels_are_kept_in_multiples_that_kernels_are_fast_at():
    config = dataclasses.replace(tiny.LLAMA, mlp_dim=512, vocabulary=300).config()
    for own in counts(config, 0.3, ("groups", "mlp"))[1]:
        assert own["mlp"] % allocation.MULTIPLE == 0
        assert own["groups"] == 1


def test_a_share_that_cannot_be_reached_is_refused():
    with pytest.raises(
        InputError, match=r"parameters is 0\.7, but with the fewest mlp in each layer the model has 35\.9% fewer"
    ):
        Width(parameters=0.7, axes="mlp")(tiny.model(), CONTEXT)
    with pytest.raises(InputError, match=r"parameters is 0\.01, but whole groups make it 0\.0%"):
        Width(parameters=0.01, axes="groups")(tiny.model(), CONTEXT)
    few_channels = dataclasses.replace(tiny.LLAMA, kv_heads=4, mlp_dim=4, vocabulary=257).config()
    share = 0.35 * 2 * (4 * 32 * 32 + 3 * 4 * 32) / trees.count(tiny.model(few_channels).params)
    with pytest.raises(InputError, match="but whole groups and mlp make it"):  # three of four heads, and no channel
        counts(few_channels, share, ("groups", "mlp"))
    with pytest.raises(InputError, match="must be between 0 and 1"):
        Width(parameters=1.0)


def test_masks_and_formats_stay():
    model, _ = recipe.apply(tiny.model(), (Magnitude(sparsity=0.5), Quantize()), CONTEXT)
    after, _ = Width(parameters=0.2)(model, CONTEXT)
    for path, leaf in trees.flatten(after.params):
        assert isinstance(leaf, QArray) == path.endswith(("kernel", "embedding"))
    for path, mask in after.masks.items():
        leaf = dict(trees.flatten(after.params))[path]
        assert mask.shape == leaf.shape
        assert not np.any(np.asarray(leaf.values)[~np.asarray(mask)])


def test_on_a_mesh_it_is_the_same():
    model = tiny.model()
    mesh = meshes.data_parallel(8)
    assert mesh.size == 8
    alone, _ = Width(parameters=0.2)(model, CONTEXT)
    spread, _ = Width(parameters=0.2)(model, dataclasses.replace(CONTEXT, mesh=mesh))
    assert spread.config == alone.config
    np.testing.assert_allclose(logits(sharding.on_one_device(spread)), logits(alone), atol=2e-3)


def test_the_slices_that_stay_keep_their_order():
    model = tiny.model()
    after, _ = Width(parameters=0.2, axes="mlp", refit=False)(model, CONTEXT)
    before = np.asarray(model.params["block_0"]["feedforward"]["up"]["kernel"]).T.tolist()
    found = [
        before.index(column) for column in np.asarray(after.params["block_0"]["feedforward"]["up"]["kernel"]).T.tolist()
    ]
    assert found == sorted(found)
    assert slicing.sizes(after.config.blocks[0])["mlp"] == len(found)
