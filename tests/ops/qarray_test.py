"""Every format against float64 numpy: rounding, packing, the parts of a matrix, straight-through gradients."""

import dataclasses
import itertools

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops
from efflm.config import InputError
from efflm.ops import Format, qarray
from efflm.ops.grid import as_stored, by_entry, grid_of
from efflm.ops.packing import pack, unpack
from efflm.ops.qarray import operands, quantize_array, take

# one program each, not one an operation
apply_mask, codes, dequantize, rows = map(jax.jit, (qarray.apply_mask, qarray.codes, qarray.dequantize, qarray.rows))
MATRICES = arrays.arrays(  # few shapes: each compiles anew
    np.float32,
    st.sampled_from([(1, 1), (5, 9), (12, 7)]),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
BITS = st.sampled_from(range(2, 9))
FORMATS = st.builds(Format, bits=BITS, group=st.sampled_from([0, 2, 5]), symmetric=st.booleans()) | st.builds(
    Format, bits=BITS, group=st.just(2), symmetric=st.booleans(), super_block=st.just(256)
)
AXES = st.sampled_from([-1, -2])


def by_group(matrix, axis, group):
    """The indices along the contracted axis that share a scale."""
    size = matrix.shape[axis]
    return [slice(start, min(start + (group or size), size)) for start in range(0, size, group or size)]


@given(MATRICES, AXES, FORMATS)
def test_every_weight_gets_the_nearest_of_all_codes_and_zeros_stay(w, axis, form):
    q = quantize_array(jnp.asarray(w), axis, form)
    assert q.shape == w.shape
    back, numbers = np.float64(dequantize(q)), np.asarray(codes(q))
    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    assert (form.low, form.high) == (low, high)
    assert np.all(back[w == 0] == 0)
    coarse = 2**-11 if q.format.scale_dtype == "float16" else 2**-8  # of the stored scale
    coarse, more = (0, np.abs(qarray.scales(q)).max() / 118) if q.super_block else (coarse, 0)  # rounded upwards
    for i, some in enumerate(by_group(w, axis, form.group)):
        at = (slice(None), some) if axis == -1 else (some, slice(None))
        step = np.float64(np.take(np.asarray(qarray.scales(q)), [i], axis=axis))
        zero = 0 if q.zeros is None else np.float64(np.take(np.asarray(qarray.zero_points(q)), [i], axis=axis))
        reachable = (np.arange(low, high + 1).reshape(-1, 1, 1) - zero) * step
        nearest = np.abs(np.float64(w[at]) - reachable).min(axis=0)
        error = np.abs(np.float64(w[at]) - back[at])
        assert np.all(error <= nearest + np.abs(step) * (1e-5 + 2.0**-24 * 2**form.bits) + 1e-12)
        assert np.all(error <= np.abs(step) * ((1 if form.symmetric else 0.5) + 2**form.bits * coarse))
        most = np.abs(w[at]).max(axis, keepdims=True)
        if form.symmetric:  # the largest magnitude is the least code, whatever its sign
            used = most[most > 0] / -low
            assert np.all(np.abs(step[most > 0]) >= used * (1 - coarse))
            assert np.all(np.abs(step[most > 0]) <= used * (1 + coarse) + more)
            assert q.super_block or np.all(numbers[at].min(axis)[most.squeeze(axis) > 0] == low)
        else:
            assert np.all(step[most > 0] <= 2 * most[most > 0] / (high - low) * (1 + coarse) + more)


@given(MATRICES, AXES, FORMATS)
def test_rounding_twice_changes_nothing(w, axis, form):
    once = quantize_array(jnp.asarray(w), axis, form)
    twice = ops.requantize(dequantize(once), once)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert jax.tree.map(lambda x: x.dtype, twice) == jax.tree.map(lambda x: x.dtype, once)
    step = np.abs(by_entry(qarray.scales(once), axis, once.group, w.shape[axis]))
    off = 1 if once.super_block else 2.0 ** (form.bits - 8)  # scales are rounded up; in full they have 8 bits at least
    assert np.all(np.abs(dequantize(twice) - dequantize(once)) <= step * (off + 1e-4))


@given(
    st.sampled_from(range(2, 9)),
    st.sampled_from([0, 1, -1]),
    arrays.arrays(np.int8, arrays.array_shapes(min_dims=2, max_dims=3, max_side=11), elements=st.integers(-2, 1)),
)
def test_packing_is_undone_and_as_small_as_it_says(bits, axis, numbers):
    packed = pack(numbers, bits, axis)
    size = numbers.shape[axis]
    np.testing.assert_array_equal(unpack(packed, bits, size, axis), numbers)
    whole = {8: size, 6: 3 * -(-size // 4), 4: -(-size // 2), 2: -(-size // 4)}.get(bits, bits * -(-size // 8))
    assert packed.shape[axis] == whole


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_on_a_device_is_that_of_numpy(rng, bits):
    numbers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 13, 5)).astype(np.int8)
    packed = pack(jnp.asarray(numbers), bits, -2)
    np.testing.assert_array_equal(packed, pack(numbers, bits, -2))
    np.testing.assert_array_equal(unpack(packed, bits, 13, -2), numbers)


def test_packed_bits_lie_lowest_first():
    np.testing.assert_array_equal(pack(np.array([1, -1, 3], np.int8), 4), [0xF1, 0x03])
    eight = np.array([1, 2, 3, -4, -3, -2, -1, 0], np.int8)
    for bits in (3, 5, 7):
        word = sum((int(c) % 2**bits) << bits * i for i, c in enumerate(eight))
        np.testing.assert_array_equal(pack(eight, bits), [word >> 8 * i & 255 for i in range(bits)])


@given(MATRICES, AXES, FORMATS, st.data())
def test_parts_of_a_matrix_are_those_of_its_floats(w, axis, form, data):
    q = quantize_array(jnp.asarray(w), axis, form)
    floats = np.asarray(dequantize(q))
    some = np.array(data.draw(st.lists(st.integers(0, w.shape[0] - 1), min_size=3, max_size=3)))
    np.testing.assert_array_equal(rows(q, jnp.asarray(some)), floats[some])
    for along in (0, 1):
        indices = np.array(data.draw(st.permutations(range(w.shape[along])))[:3])
        part = take(q, along, indices)
        assert (part.bits, part.axis) == (q.bits, q.axis)
        expected = np.take(floats, indices, axis=along)
        if form.group and along - 2 == axis:  # new groups: rounded again
            np.testing.assert_allclose(dequantize(part), expected, atol=1.01 * np.max(np.abs(qarray.scales(part))))
        else:
            np.testing.assert_array_equal(dequantize(part), expected)
    mask = data.draw(arrays.arrays(bool, w.shape))
    np.testing.assert_array_equal(dequantize(apply_mask(q, jnp.asarray(mask))), np.where(mask, floats, 0))


@given(MATRICES, AXES, FORMATS, st.booleans())
def test_the_flat_form_rebuilds_the_tree_and_its_shapes_are_predicted(w, axis, form, static):
    form = dataclasses.replace(form, activations="int8_static") if static else form
    q = quantize_array(jnp.asarray(w), axis, form, activation_scale=jnp.ones((1, 1)) if static else None)
    tree = {"a": {"kernel": q}, "scale": jnp.ones(3)}
    flat, formats = ops.storage.to_flat(tree)
    back = ops.storage.from_flat(flat, formats)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    shapes = ops.storage.part_shapes(w.shape, formats["a/kernel"])
    for name, shape in shapes.items():
        if name != "zeros" or not form.symmetric:
            assert flat[f"a/kernel/{name}"].shape == shape
            assert ops.storage.is_dtype_of(flat[f"a/kernel/{name}"].dtype, name, formats["a/kernel"])
    assert ("a/kernel/zeros" in flat) == (not form.symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [-1, -2])
def test_scales_in_super_blocks_cost_next_to_nothing(rng, axis, symmetric):
    """Groups of very different sizes, one of zeros, in super-blocks of which the last is shorter: bits and errors."""
    w = rng.standard_normal((600, 6)) * np.repeat(rng.lognormal(0, 1, (19, 6)), 32, axis=0)[:600]
    w[32:64] = 0
    w = jnp.asarray(w if axis == -2 else w.T, jnp.float32)
    form = Format(bits=4, group=32, symmetric=symmetric, clip=True)
    full, coded = (quantize_array(w, axis, dataclasses.replace(form, super_block=each)) for each in (0, 256))
    error = lambda q: float(jnp.sum(jnp.square(dequantize(q) - w)))
    assert 0 < error(coded) < 1.02 * error(full)
    assert ops.stored_nbytes({"w": coded}) == 6 * (300 + 19 + 2 * 3 + (0 if symmetric else 10))
    assert np.all(np.asarray(dequantize(coded))[np.asarray(w) == 0] == 0)
    plain = qarray.in_full(coded)
    np.testing.assert_array_equal(dequantize(plain), dequantize(coded))
    assert (plain.super_block, plain.scale.dtype) == (0, jnp.float16)
    tiny = quantize_array(w * 1e-9, axis, dataclasses.replace(form, super_block=256))
    assert tiny.super_scale.dtype == jnp.bfloat16
    assert float(jnp.sum(jnp.square(dequantize(tiny) * 1e9 - w))) < 1.05 * error(full)


def test_stacked_matrices_are_the_matrices_stacked(rng):
    w = jnp.asarray(rng.standard_normal((3, 10, 6)), jnp.float32)
    one = lambda w: quantize_array(w, -2, Format(bits=3, group=4, symmetric=False))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, w))
    np.testing.assert_array_equal(dequantize(stacked), jnp.stack([dequantize(one(each)) for each in w]))
    assert stacked.shape == (3, 10, 6)
    np.testing.assert_array_equal(jax.vmap(dequantize)(stacked), dequantize(stacked))
    np.testing.assert_array_equal(dequantize(jax.vmap(one)(w)), dequantize(stacked))


@pytest.mark.parametrize("axis", [-1, -2])
def test_straight_through_rounds_forward_and_passes_gradients(rng, axis):
    w = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    like = quantize_array(w, axis)
    value, pull = jax.vjp(lambda m: ops.straight_through(m, like), w)
    np.testing.assert_allclose(value, dequantize(like), rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.full_like(w, 3.0))[0], np.full(w.shape, 3.0))
    np.testing.assert_array_equal(ops.requantize(w, like).values, like.values)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    form=st.builds(Format, bits=BITS, group=st.sampled_from([0, 4, 8]), symmetric=st.booleans()),
    K=st.sampled_from([5, 16]),
)
def test_gradients_on_a_grid_are_those_of_rounding_that_adds_a_constant(seed, form, K):
    """Esser 2020, equations 1 to 3; some weights are beyond the grid, by more than half a step."""
    rng = np.random.default_rng(seed)
    w, toward = rng.standard_normal((2, K, 3))
    count = form.group_in(K) or K
    shape = -(-K // count), 3
    scale = rng.choice([-1, 1], shape) * np.exp(rng.normal(np.log(1.5 / form.high), 0.3, shape))
    zeros = np.zeros(shape) if form.symmetric else rng.integers(form.low, form.high + 1, shape)

    def by_reference(w, scale, added=None):
        s, zero = (np.repeat(part, count, axis=0)[:K] for part in (scale, zeros))
        reached = np.clip(w / s, form.low - zero - 0.5, form.high - zero + 0.5)
        code = np.clip(np.round(w / s), form.low - zero, form.high - zero)
        return (code if added is None else reached + added) * s, code - reached

    def rounded(w, scale):
        return qarray.on_grid(w, -2, form, (scale, None if form.symmetric else jnp.int8(zeros)))

    wanted, added = by_reference(w, scale)
    arrays = jnp.asarray(w, jnp.float32), jnp.asarray(scale, jnp.float32)
    values, pull = jax.vjp(rounded, *arrays)
    found, sure = pull(jnp.asarray(toward, jnp.float32)), np.abs(np.abs(added) - 0.5) > 1e-3
    np.testing.assert_allclose(np.where(sure, values, wanted), wanted, rtol=1e-4, atol=1e-5)
    step, surely = 1e-6, (sure, np.array([np.all(sure[i : i + count], 0) for i in range(0, K, count)]))
    for which, grad in enumerate(found):
        for place in zip(*np.nonzero(surely[which])):
            ends = []
            for sign in (1, -1):
                moved = [w.copy(), scale.copy()]
                moved[which][place] += sign * step
                ends.append(np.sum(by_reference(*moved, added)[0] * toward))
            np.testing.assert_allclose(grad[place], (ends[0] - ends[1]) / (2 * step), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("static", [False, True])
def test_training_rounds_activations_as_inference_does(rng, static):
    """Training multiplies the rounded operands that inference multiplies, and passes gradients straight through."""
    scale = jnp.full((1, 1), 0.03, jnp.float32)
    how = ("int8_static", scale) if static else ("int8", None)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 24), (24, 5)))
    like = quantize_array(w, -2, Format(activations=how[0]), activation_scale=how[1])
    trained = lambda x, w: ops.dot(x, ops.straight_through(w, like))
    np.testing.assert_allclose(trained(x, w), ops.dot(x, like), rtol=1e-5, atol=1e-5)
    assert np.abs(trained(x, w) - ops.dot(x, dequantize(like))).max() > 1e-3  # what weights alone would give
    rounded_x, rounded_w = operands(x, ops.straight_through(w, like))
    dx, dw = jax.vjp(trained, x, w)[1](jnp.ones((4, 5)))
    np.testing.assert_allclose(dx, jnp.ones((4, 5)) @ rounded_w.T, rtol=1e-5)
    np.testing.assert_allclose(dw, rounded_x.T @ jnp.ones((4, 5)), rtol=1e-5, atol=1e-6)


def test_what_no_format_has_is_refused():
    w = jnp.ones((4, 4))
    with pytest.raises(InputError, match="bits is 9: choose from 8, 7, 6, 5, 4, 3, 2"):
        Format(bits=9)
    with pytest.raises(InputError, match="group is -1"):
        Format(group=-1)
    for group in (0, 48, 256):
        with pytest.raises(InputError, match=f"super_block is 256, of groups of {group}: give a group that divides it"):
            Format(group=group, super_block=256)
    with pytest.raises(InputError, match="activations is 'int4': choose from float, int8, int8_static"):
        Format(activations="int4")
    with pytest.raises(InputError, match="a static scale goes with int8_static"):
        quantize_array(w, 0, Format(activations="int8_static"))
    good = ops.storage.to_flat({"w": quantize_array(w, 0)})[1]["w"]
    refused = {"bits": 9, "axis": 0, "size": 3, "group": 4, "activations": "int3", "dtype": "float64"}
    for wrong in (*({name: value} for name, value in refused.items()), {"group": 1.0}, {"super_block": 256}):
        with pytest.raises(InputError):
            ops.storage.part_shapes((4, 4), good | wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e9])
def test_scales_of_any_dtype_hold_any_weights(rng, size, dtype):
    """Codes are those of the scales as they are stored; float16 is left alone for what it does not hold."""
    w = np.float32(size * rng.standard_normal((64, 5)))
    q = quantize_array(jnp.asarray(w), -2, Format(bits=4, group=16))
    assert q.scale.dtype == (jnp.float16 if size == 1 else jnp.bfloat16)
    assert (q.dtype, dequantize(q).dtype) == ("float32", jnp.float32)
    lost = lambda q: np.linalg.norm(dequantize(q) / np.float32(size) - w / np.float32(size)) / np.linalg.norm(w / size)
    assert lost(q) < 0.1
    given = quantize_array(jnp.asarray(w), -2, Format(bits=4, group=16, scale_dtype=dtype))
    assert given.scale.dtype == dtype
    assert np.all(np.isfinite(given.scale) & (given.scale != 0))
    assert lost(given) < 0.1 or (dtype == "float16" and size != 1)


@given(MATRICES, AXES, FORMATS, st.booleans())
def test_a_searched_range_is_never_worse_and_is_what_is_stored(w, axis, form, measured):
    """By the error that was searched for, in float64; storing the grid again changes nothing."""
    importance = np.float32(np.arange(w.shape[axis]) % 4) if measured else None
    searched = dataclasses.replace(form, clip=True)
    grid = grid_of(jnp.asarray(w), axis, searched, importance)
    weight = np.abs(np.float64(w)) if importance is None else np.expand_dims(np.float64(importance), -3 - axis)
    weight = weight + np.zeros(w.shape)
    if importance is None:
        for some in by_group(w, axis, form.group):
            at = (slice(None), some) if axis == -1 else (some, slice(None))
            length = min(form.group or w.shape[axis], w.shape[axis])  # a shorter last group is filled up with zeros
            weight[at] += np.sqrt(np.square(np.float64(w[at])).sum(axis, keepdims=True) / length)

    def error(q):
        each = weight * np.square(np.float64(w) - np.float64(dequantize(q)))
        groups = by_group(w, axis, form.super_block or form.group)  # what is taken or left together
        return np.stack([np.take(each, np.r_[some], axis).sum(axis) for some in groups])

    whole, found = (quantize_array(jnp.asarray(w), axis, each, importance=importance) for each in (form, searched))
    assert np.all(error(found) <= error(whole) * (1 + 1e-3) + 1e-3 * np.square(np.abs(w).max()) * 1e-3)
    np.testing.assert_array_equal(qarray.scales(found), grid[0])
    np.testing.assert_array_equal(as_stored(grid[0], axis, form), grid[0])
    again = quantize_array(jnp.asarray(w), axis, form, grid)
    np.testing.assert_array_equal(again.values, found.values)


def test_a_searched_range_pays():
    """Weights of a normal distribution, of which a tenth matter: what is left of their error, by the reference."""
    rng = np.random.default_rng(0)
    w, importance = rng.standard_normal((320, 64)).astype(np.float32), np.float32(rng.random(320) < 0.1)
    lost = {}
    for bits, symmetric, clip in itertools.product((4, 3, 2), (True, False), (False, True)):
        form = Format(bits=bits, group=32, symmetric=symmetric, clip=clip)
        error = np.square(dequantize(quantize_array(jnp.asarray(w), -2, form, importance=importance)) - w)
        lost[bits, symmetric, clip] = float(error[importance > 0].mean())
    for bits, symmetric in itertools.product((4, 3, 2), (True, False)):
        assert lost[bits, symmetric, True] < 0.6 * lost[bits, symmetric, False], (bits, symmetric)


def test_a_weight_says_its_format():
    form = Format(bits=3, group=4, symmetric=False, activations="int8")
    q = quantize_array(jnp.ones((8, 3)), -2, form)
    assert q.format == dataclasses.replace(form, scale_dtype="float16")
    assert quantize_array(jnp.ones((4, 3)), -2, form).format.group == 0


@pytest.mark.parametrize(("bits", "entropy", "ranged"), [(8, 4.0, 4), (4, 3.0, 3), (4, 2.0, 2)])
def test_scales_for_an_entropy_meet_it_and_beat_ranges_in_an_entropy_coded_file(bits, entropy, ranged):
    """Of normal weights whose outputs differ in size."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((512, 256)) * np.linspace(0.1, 3, 256), jnp.float32)
    made = [
        quantize_array(w, -2, each)
        for each in (Format(bits=bits, entropy=entropy), Format(bits=ranged, group=32, clip=True))
    ]
    shares = np.unique(qarray.codes(made[0]), return_counts=True)[1] / w.size
    assert -np.sum(shares * np.log2(shares)) == pytest.approx(entropy, rel=0.035)
    own, other = (ops.stored_nbytes({"w": each}, coded=True) for each in made)
    assert own < other
    own, other = (np.mean(np.square(ops.dequantize(each) - w)) for each in made)
    assert own < 0.85 * other
    assert made[0].scale.dtype == np.float16
    zero = quantize_array(jnp.zeros((4, 2)), -2, Format(entropy=3.0))
    np.testing.assert_array_equal(ops.dequantize(zero), 0)
