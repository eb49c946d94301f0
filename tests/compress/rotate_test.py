import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.compress import grammar, recipe
from efflm.compress.calibrate import LARGEST, SQUARES, TOKENS
from efflm.compress.distill import Distill
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.rotate import Rotate, hadamard, random_hadamard
from efflm.compress.step import Context
from efflm.compress.structured.depth import Depth
from efflm.config import InputError
from efflm.config.model import BlockConfig, ModelConfig
from efflm.formats import efflm_file
from efflm.model import Transformer, placement, stack_blocks
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import seen_by

CONFIG = tiny.LLAMA.config()
CONTEXT = Context(
    mesh=meshes.make_mesh(), batches=lambda step: tiny.batch(CONFIG, seed=step), calibration=tiny.batch(CONFIG)
)
UNEQUAL = (
    BlockConfig(heads=6, kv_heads=2, head_dim=12, mlp_dim=40),
    BlockConfig(heads=2, kv_heads=1, head_dim=6, mlp_dim=24),
)
CONFIGS = {name: config for name, config in tiny.CONFIGS.items() if config.norm == "rms" and name != "gemma"} | {
    "offset": dataclasses.replace(tiny.CONFIGS["llama"], norm_offset=1.0),
    "biased": ModelConfig(  # what no family has together: every bias, parallel parts, learned positions, unequal layers
        vocabulary=300,
        width=36,
        max_length=64,
        blocks=UNEQUAL,
        position="learned",
        feedforward="gelu",
        bias=True,
        parallel=True,
    ),
    "gated": ModelConfig(vocabulary=300, width=12, max_length=64, blocks=UNEQUAL, bias=True, tied=False),
}


def logits(model):
    batch = CONTEXT.calibration
    found = tiny.logits(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"])
    return np.asarray(found)[batch["segments"] > 0]


def assert_same(found, wanted):
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 28, 36, 44, 60, 104, 288, 576])
def test_every_entry_of_a_rotation_has_the_same_magnitude(size):
    flat = hadamard(size)
    np.testing.assert_array_equal(np.abs(flat), 1)
    np.testing.assert_array_equal(flat @ flat.T, size * np.eye(size))
    found = random_hadamard(size, jax.random.key(1)) * np.sqrt(size)
    signs = found / flat
    np.testing.assert_allclose(signs, np.broadcast_to(np.sign(signs[:, :1]), signs.shape), rtol=1e-6)
    assert size < 8 or set(np.sign(signs[:, 0])) == {-1, 1}
    assert size == 1 or not np.allclose(found, np.sqrt(size) * random_hadamard(size, jax.random.key(2)))


@pytest.mark.parametrize("size", [3, 6, 9, 26, 52, 92])
def test_where_there_is_no_such_matrix_a_rotation_is_a_random_one(size):
    assert hadamard(size) is None
    found = random_hadamard(size, jax.random.key(1)).astype(np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(size), atol=1e-5)
    odd = size // (size & -size)
    rest = found[:odd, :odd] * np.sqrt(size // odd)  # with the signs of the first rows
    np.testing.assert_allclose(np.abs(found), np.kron(np.ones((size // odd,) * 2), np.abs(rest)) / np.sqrt(size // odd))
    assert not np.allclose(np.abs(found), np.abs(random_hadamard(size, jax.random.key(2))))


@pytest.mark.parametrize("name", tiny.and_combinations(CONFIGS, ["llama", "qwen3", "offset", "biased", "gated"]))
def test_the_model_computes_the_same(name):
    model = tiny.model(CONFIGS[name])
    after, record = Rotate()(model, CONTEXT)
    assert_same(logits(after), logits(model))
    moved = {
        path for path, _ in trees.flatten(after.params) if not path.endswith(("query_norm/scale", "key_norm/scale"))
    }
    untouched = {"query/bias", "key/bias", "gate/bias", "up/bias"}  # made by what reads, of what is not rotated
    wanted = {path for path in moved if not path.endswith(tuple(untouched))}
    assert set(record.leaves) == wanted
    for path, leaf in trees.select(after.params, "norm/scale"):
        if path in wanted:
            np.testing.assert_array_equal(leaf + model.config.norm_offset, 1)


def test_weights_are_those_of_the_equations():
    """Q = x's rotation, of one layer by hand in float64; H is found from the values."""
    model = tiny.model(tiny.UNTIED)
    after, _ = Rotate()(model, CONTEXT)
    old, new = (
        {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(each.params)} for each in (model, after)
    )
    Q = np.linalg.lstsq(old["embedding"], new["embedding"], rcond=None)[0]
    np.testing.assert_allclose(Q.T @ Q, np.eye(32), atol=1e-5)
    near = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(new["unembedding"], Q.T @ np.diag(old["final_norm/scale"]) @ old["unembedding"], **near)
    for i in range(2):
        norm = {part: np.diag(old[f"block_{i}/{part}_norm/scale"]) for part in ("attention", "feedforward")}
        for path in ("attention/query", "attention/key", "feedforward/gate", "feedforward/up"):
            wanted = Q.T @ norm[path.split("/")[0]] @ old[f"block_{i}/{path}/kernel"]
            np.testing.assert_allclose(new[f"block_{i}/{path}/kernel"], wanted, **near)
        down = f"block_{i}/feedforward/down/kernel"
        np.testing.assert_allclose(new[down], old[down] @ Q, **near)
        value, output = (f"block_{i}/attention/{part}/kernel" for part in ("value", "output"))
        before = Q.T @ norm["attention"] @ old[value]
        H = np.linalg.lstsq(before[:, :8], new[value][:, :8], rcond=None)[0]
        np.testing.assert_allclose(np.abs(H), 1 / np.sqrt(8), **near)
        np.testing.assert_allclose(new[value], before @ np.kron(np.eye(2), H), **near)
        np.testing.assert_allclose(new[output], np.kron(np.eye(4), H.T) @ old[output] @ Q, **near)


def test_seeds_dtypes_and_chains():
    model = tiny.model()
    one, record = Rotate()(model, CONTEXT)
    other, _ = Rotate()(model, dataclasses.replace(CONTEXT, seed=1))
    assert record.seed == 0
    assert np.abs(one.params["embedding"] - other.params["embedding"]).max() > 0.1
    twice, _ = recipe.apply(model, (Rotate(), Rotate()), dataclasses.replace(CONTEXT, seed=1))
    assert_same(logits(twice), logits(model))
    low, _ = recipe.apply(model, (*grammar.chain("bfloat16"), Rotate()), CONTEXT)
    assert {leaf.dtype.name for _, leaf in trees.flatten(low.params)} == {"bfloat16"}
    assert np.square(logits(low) - logits(model)).mean() < 1e-3 * np.square(logits(model)).mean()


def test_stacked_layers_compute_the_same():
    model = tiny.model()
    after, _ = Rotate()(model, CONTEXT)
    stacked = stack_blocks(after.params, after.config)
    tokens = tiny.tokens(CONFIG, 2, 9)
    found, _ = Transformer(after.config, scanned=True).apply({"params": stacked}, tokens)
    assert_same(np.asarray(found), np.asarray(tiny.logits(model, tokens)))


def test_on_eight_devices_it_is_the_same():
    mesh, model = meshes.make_mesh(data=2, fsdp=2, tensor=2), tiny.model()
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    one, _ = Rotate()(model, CONTEXT)
    after, _ = Rotate()(spread, dataclasses.replace(CONTEXT, mesh=mesh))
    where, wanted = dict(trees.flatten(placement.shardings(after.params, mesh))), dict(trees.flatten(one.params))
    for path, leaf in trees.flatten(after.params):
        assert leaf.sharding.is_equivalent_to(where[path], leaf.ndim), path
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-6)


def with_outliers(factor):
    """A model three channels of whose residual stream are larger by a factor, and what reads them smaller by it."""
    model = tiny.model(dataclasses.replace(tiny.UNTIED, width=64, mlp_dim=96))
    large = jnp.ones(64).at[jnp.array([3, 21, 60])].set(factor)

    def one(path, w):
        if path.endswith(("query/kernel", "key/kernel", "value/kernel", "gate/kernel", "up/kernel", "unembedding")):
            return w / large[:, None]
        return w * large[None] if path.endswith(("embedding", "output/kernel", "down/kernel")) else w

    return model.replace(params=trees.map_with_path(one, model.params))


def lost(step, *models):
    """The squared error of logits that rounding causes, of models that compute the same."""
    return [np.square(logits(step(each, CONTEXT)[0]) - logits(models[0])).mean() for each in models]


def test_no_channel_of_activations_stands_out():
    model = with_outliers(30.0)
    after, _ = Rotate()(model, CONTEXT)
    assert_same(logits(after), logits(model))
    statistics = {"largest": LARGEST, "squares": SQUARES, "tokens": TOKENS}
    seen = [seen_by(each, CONTEXT.calibration, statistics) for each in (model, after)]
    for path in (path for path in seen[0] if not path.endswith(("output/kernel", "down/kernel"))):
        before, now = (
            each[path]["largest"].max() / np.sqrt(np.mean(each[path]["squares"] / each[path]["tokens"]))
            for each in seen
        )
        assert now < 0.8 * before, path
    for activations in ("int8", "int8_static"):
        before, now = lost(Quantize(activations=activations, embeddings=0), model, after)
        assert now < 0.4 * before, activations


def test_no_row_of_weights_stands_out():
    model = with_outliers(0.1)
    before, now = lost(Quantize(bits=4, group=32, embeddings=0), model, Rotate()(model, CONTEXT)[0])
    assert now < 0.5 * before, (now, before)


@pytest.mark.parametrize("name", ["llama", "untied"])
def test_tied_embeddings_come_apart_and_bytes_are_as_predicted(name, tmp_path):
    model = tiny.model(tiny.CONFIGS[name])
    after, records = recipe.apply(model, (Rotate(),), CONTEXT)
    assert not after.config.tied
    assert after.config == dataclasses.replace(model.config, tied=False)
    more = model.params["embedding"].nbytes if model.config.tied else 0
    assert records[0].predicted_bytes == trees.nbytes(model.params) + more
    size = efflm_file.save(tmp_path / "m.safetensors", after, {}, records)
    assert abs(size - records[0].predicted_bytes) <= 65536
    back, about = efflm_file.load(tmp_path / "m.safetensors")
    assert about["lineage"][0]["actual_bytes"] == records[0].predicted_bytes
    assert back.config == after.config
    np.testing.assert_array_equal(logits(back), logits(after))


def test_other_steps_follow():
    small, _ = recipe.apply(
        tiny.model(), (Rotate(), Depth(), Distill(steps=1), Magnitude(sparsity=0.5), Quantize()), CONTEXT
    )
    assert len(small.config.blocks) == 1
    assert set(small.params) == {"embedding", "unembedding", "block_0", "final_norm"}
    assert np.all(np.isfinite(logits(small)))


def test_what_cannot_be_rotated():
    with pytest.raises(InputError, match=r"^norm is 'layer', but must be 'rms': .* use SmoothQuant"):
        Rotate()(tiny.model(tiny.GPT2), CONTEXT)
    with pytest.raises(InputError, match=r"^post_norm is True: .* do not commute with a rotation"):
        Rotate()(tiny.model(tiny.CONFIGS["gemma"]), CONTEXT)
    with pytest.raises(InputError, match="kernel is quantized already: rotate the model before it is rounded"):
        recipe.apply(tiny.model(), (*grammar.chain("w8a16"), Rotate()), CONTEXT)
    with pytest.raises(InputError, match=r"pruned already, .* rotate the model before it is pruned"):
        recipe.apply(tiny.model(), (Magnitude(sparsity=0.5), Rotate()), CONTEXT)
