import dataclasses

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from efflm import trees
from efflm.config.model import ModelShape
from efflm.config.train import TrainConfig
from efflm.model import init_params, placement, stack_blocks
from efflm.parallel import meshes
from efflm.train import adamw8bit, losses, optimizer
from efflm.train.adamw8bit import BLOCK, Quantized, dequantize, quantize
from efflm.train.step import make_step, place
from tests import tiny

SETTINGS = TrainConfig(steps=20, warmup=1, batch=8, length=16, learning_rate=1e-2, optimizer="adamw8bit")
REAL = ModelShape(layers=6, width=384, heads=6, kv_heads=2, mlp_dim=1024, vocabulary=4096)


# --- the dynamic map -----------------------------------------------------------------------------------------------


def read_bits(code: int, signed: bool) -> float:
    """The magnitude of a code, from its bits (Dettmers 2021, section 1.3): zeros, an indicator 1, a linear fraction."""
    bits = f"{code:07b}" if signed else f"{code + 1:08b}"  # unsigned: two values in the smallest decade already
    zeros = bits.index("1")
    fraction = bits[zeros + 1 :]
    cells = 2 ** len(fraction)
    middle = (int(fraction, 2) + 0.5 if fraction else 0.5) / cells
    return 10.0**-zeros * (0.1 + 0.9 * middle)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_reads_the_bits_of_its_codes(signed):
    magnitudes = adamw8bit.dynamic_map(signed)
    assert len(magnitudes) == (128 if signed else 256)
    assert (magnitudes[0], magnitudes[-1]) == (0.0, 1.0)
    assert np.all(np.diff(magnitudes) > 0)
    for code in range(1, len(magnitudes) - 1):
        np.testing.assert_allclose(magnitudes[code], read_bits(code, signed), rtol=1e-12)


def test_the_smallest_values_are_those_of_seven_decades():
    np.testing.assert_allclose(adamw8bit.dynamic_map(True)[1], 0.55e-6)
    np.testing.assert_allclose(adamw8bit.dynamic_map(False)[1:3], [0.325e-6, 0.775e-6])


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_the_nearest_value(signed, rng):
    magnitudes = adamw8bit.dynamic_map(signed)
    ratios = np.concatenate([rng.uniform(0, 1, 5000), 10.0 ** rng.uniform(-9, 0, 5000), magnitudes])
    ratios = ratios.astype(np.float32)
    codes = np.asarray(jax.jit(adamw8bit.nearest_code, static_argnums=1)(ratios, signed)).astype(int)
    error = lambda code: np.abs(magnitudes[code] - ratios)
    nearest = np.min(np.abs(magnitudes[None, :] - np.float64(ratios)[:, None]), axis=1)
    np.testing.assert_allclose(error(codes), nearest, atol=1e-7)


# --- blocks --------------------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(3, 5), (2, BLOCK), (2, BLOCK + 1), (1, 2 * BLOCK), (2, 2, 300), (1, 1)])
SIZES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ARRAYS = SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=SIZES))


def scale_of_each(x):
    """The largest magnitude of the block that each entry lies in, by a loop."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[-1], BLOCK):
        part = slice(start, start + BLOCK)
        out[..., part] = np.abs(x[..., part]).max(-1, keepdims=True)
    return out


@given(ARRAYS)
def test_an_entry_is_off_by_at_most_half_a_step_of_its_decade(x):
    """A step is 0.9 * 10^e / cells, and a decade above 1e-3 of the scale has 8 cells or more (unsigned 16)."""
    for signed, w in ((True, x), (False, np.abs(x))):
        back, scale = np.float64(dequantize(quantize(w, signed))), scale_of_each(w)
        off = np.abs(back - w)
        large = np.abs(w) > 0.1 * scale
        assert np.all(off[large] <= (0.011 if signed else 0.0036) * scale[large] * 1.0001)
        middling = np.abs(w) > 1e-3 * scale
        assert np.all(off[middling] <= (0.32 if signed else 0.16) * np.abs(w)[middling])
        assert np.all(off <= (0.0141 if signed else 0.0071) * scale + 1e-30)


@given(ARRAYS)
def test_signs_zeros_and_the_largest_entry_are_exact(x):
    back, scale = np.asarray(dequantize(quantize(x, True))), scale_of_each(x)
    np.testing.assert_array_equal(back[x == 0], 0.0)
    assert np.all(back * x >= 0)
    largest = np.abs(x) == scale
    np.testing.assert_array_equal(back[largest], x[largest])


@given(ARRAYS)
def test_a_second_rounding_changes_nothing(x):
    for signed, w in ((True, x), (False, np.abs(x))):
        once = quantize(w, signed)
        twice = quantize(dequantize(once), signed)
        jax.tree.map(np.testing.assert_array_equal, once, twice)


@given(ARRAYS)
def test_positive_second_moments_never_become_zero(x):
    v = np.square(x / 1e3)
    q = quantize(v, False)
    np.testing.assert_array_equal(np.asarray(q.values) == 0, v < np.finfo(np.float32).tiny)  # XLA has no subnormals


def test_blocks_do_not_see_each_other_and_the_last_may_be_short():
    x = np.ones((1, BLOCK + 3), np.float32)
    x[0, :BLOCK] = 1e6
    q = quantize(x, True)
    np.testing.assert_array_equal(q.scale, [[1e6, 1.0]])
    np.testing.assert_array_equal(dequantize(q), x)


# --- the transformation --------------------------------------------------------------------------------------------


def test_two_steps_follow_adam_on_the_rounded_moments(rng):
    tx = adamw8bit.scale_by_adam8bit(0.9, 0.99)
    params = {"kernel": jnp.zeros((3, 300)), "scale": jnp.zeros(3)}
    state = tx.init(params)
    m, v = ({path: np.zeros(w.shape) for path, w in params.items()} for _ in range(2))
    for t in (1, 2):
        grads = {path: rng.standard_normal(w.shape) for path, w in params.items()}
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state)
        for path, g in grads.items():
            m[path], v[path] = 0.9 * m[path] + 0.1 * g, 0.99 * v[path] + 0.01 * g * g
            expected = m[path] / (1 - 0.9**t) / (np.sqrt(v[path] / (1 - 0.99**t)) + 1e-8)
            np.testing.assert_allclose(updates[path], expected, rtol=2e-3, atol=1e-5)
        for moment, kept in ((m, state.mu), (v, state.nu)):
            np.testing.assert_allclose(kept["scale"], moment["scale"], rtol=1e-4)  # vectors stay in float32
            rounded = np.float64(dequantize(kept["kernel"]))
            assert np.all(np.abs(rounded - moment["kernel"]) < 0.015 * scale_of_each(moment["kernel"]))
            moment["kernel"] = rounded
    assert (state.mu["kernel"].values.dtype, state.nu["kernel"].values.dtype) == (jnp.int8, jnp.uint8)


def test_heavy_tails_and_vanishing_gradients_cause_no_huge_steps(rng):
    """Second moments of one block span 14 decades and more; then the gradient of half its entries stops.

    In float32 no entry's step exceeds 1 / sqrt(1 - 0.99) in magnitude; here a second moment that was rounded to 0
    under a first one that was not would step by m / eps, up to 1e6.
    """
    tx, exact = adamw8bit.scale_by_adam8bit(0.9, 0.99), optax.scale_by_adam(0.9, 0.99)
    params = {"kernel": jnp.zeros((4, 512))}
    state, reference, worst, largest = tx.init(params), exact.init(params), 0.0, 0.0
    update, update_exact = jax.jit(tx.update), jax.jit(exact.update)
    size = 10.0 ** rng.uniform(-7, 2, (4, 512))
    for step in range(60):
        g = size * rng.standard_cauchy((4, 512))
        g[:, ::2] *= step < 5
        grads = {"kernel": jnp.asarray(g, jnp.float32)}
        updates, state = update(grads, state)
        expected, reference = update_exact(grads, reference)
        worst = max(worst, float(jnp.max(jnp.abs(updates["kernel"]))))
        largest = max(largest, float(jnp.max(jnp.abs(expected["kernel"]))))
    assert largest < 10
    assert worst < 1.5 * largest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_real_models_state_is_at_most_2_1_bytes_a_parameter(family, stacked):
    config = dataclasses.replace(REAL, family=family).config()
    fresh = lambda: stack_blocks(init_params(config, 0), config) if stacked else init_params(config, 0)
    params = jax.eval_shape(fresh)
    each = optimizer.state_bytes(optimizer.make(SETTINGS), params)
    assert 2.0 < each <= 2.1
    assert optimizer.state_bytes(optimizer.make(dataclasses.replace(SETTINGS, optimizer="adamw")), params) > 7.99


def test_the_state_survives_being_written_as_plain_arrays(rng):
    """Leaves to numpy and back by their paths, as a checkpoint does, then the same step to the bit."""
    params = {"block_0": {"up": {"kernel": jnp.asarray(rng.standard_normal((4, 300)), jnp.float32)}}}
    tx = optimizer.make(SETTINGS)
    _, state = tx.update(params, tx.init(params), params)
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(state, inside=True)}
    assert {path.split("kernel/")[1] for path in flat if "kernel/" in path} == {"values", "scale"}
    paths, structure = [path for path, _ in trees.flatten(state, inside=True)], jax.tree.structure(state)
    again = jax.tree.unflatten(structure, [jnp.asarray(flat[path]) for path in paths])
    jax.tree.map(np.testing.assert_array_equal, tx.update(params, state, params), tx.update(params, again, params))


def trajectory(mesh, stacked):
    model = tiny.model(dataclasses.replace(tiny.LLAMA, layers=1 + stacked, width=64, mlp_dim=512))
    params = stack_blocks(model.params, model.config) if stacked else model.params
    tx = optimizer.make(SETTINGS)
    state = tiny.init_state(params, tx, mesh)
    step = make_step(losses.language_model_loss(model.config, scanned=stacked), tx, 0, state)
    out = []
    for _ in range(5):
        state, metrics = step(state, {}, place(tiny.batch(model.config), mesh))
        out.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return out, state


@pytest.mark.parametrize("stacked", tiny.and_combinations([False, True], [True]))
def test_eight_devices_keep_a_part_of_the_state_each_and_train_like_one(stacked):
    one, _ = trajectory(meshes.make_mesh(), stacked)
    eight, state = trajectory(meshes.make_mesh(data=2, fsdp=2, tensor=2), stacked)
    np.testing.assert_allclose(eight, one, rtol=2e-3)
    assert one[-1] < one[0]
    is_moment = lambda node: isinstance(node, Quantized)
    nodes = jax.tree_util.tree_leaves_with_path(state.optimizer, is_leaf=is_moment)
    moments = [node for path, node in nodes if is_moment(node) and "'up'" in jax.tree_util.keystr(path)]
    assert len(moments) == 2
    spec = PartitionSpec(*((None,) if stacked else ()), "fsdp", "tensor")
    for node in moments:
        assert (node.values.sharding.spec, node.scale.sharding.spec) == (
            spec,
            spec,
        )  # 512 columns: a block on each part
        assert node.values.addressable_shards[0].data.size == node.values.size // 4


def test_whole_blocks_on_every_device_need_no_communication():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    params = {"blocks_0": {"feedforward": {"up": {"kernel": jnp.zeros((3, 64, 512))}}}}
    tx = adamw8bit.scale_by_adam8bit()
    state = jax.eval_shape(tx.init, params)
    where = placement.shardings(params, mesh), placement.shardings(state, mesh)
    program = jax.jit(tx.update, in_shardings=where, out_shardings=where).lower(params, state).compile().as_text()
    assert "s8[3,32,256]" in program
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in program
