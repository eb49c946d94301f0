import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.ops.qarray import contracted_axis, from_flat, requantize, straight_through, to_flat

MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(MATRICES, st.sampled_from([0, 1]))
def test_error_is_at_most_half_a_step_and_zeros_stay(w, axis):
    q = ops.quantize_array(jnp.asarray(w), axis)
    error = np.abs(np.float64(w) - np.float64(q.values) * np.float64(q.scale))
    assert np.all(error <= np.float64(q.scale) * 0.5 * (1 + 1e-5) + 1e-12)
    assert np.all(np.asarray(q.values)[w == 0] == 0)
    assert q.values.dtype == jnp.int8
    assert np.abs(np.asarray(q.values, np.int32)).max() <= 127
    assert q.scale.shape[axis] == 1


@given(MATRICES, st.sampled_from([0, 1]))
def test_rounding_twice_changes_nothing(w, axis):
    once = ops.quantize_array(jnp.asarray(w), axis)
    twice = ops.quantize_array(ops.dequantize(once), axis)
    np.testing.assert_array_equal(once.values, twice.values)


def test_flat_form_rebuilds_the_tree():
    tree = {"a": {"kernel": ops.quantize_array(jnp.ones((4, 3)), 0, "int8")}, "scale": jnp.ones(3)}
    flat, kinds = to_flat(tree)
    assert set(flat) == {"a/kernel/values", "a/kernel/scale", "scale"}
    back = from_flat(flat, kinds)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert trees.count(tree) == 15


@pytest.mark.parametrize("axis", [0, 1])
def test_straight_through_rounds_forward_and_passes_gradients(rng, axis):
    w = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    like = ops.quantize_array(w, axis)
    assert contracted_axis(like) == axis
    value, pull = jax.vjp(lambda m: straight_through(m, like), w)
    np.testing.assert_allclose(value, ops.dequantize(like), rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.full_like(w, 3.0))[0], np.full(w.shape, 3.0))
    np.testing.assert_array_equal(requantize(w, like).values, like.values)
