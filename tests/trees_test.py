import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.parallel import meshes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_found_in_every_dtype(dtype):
    dtype = jnp.dtype(dtype)
    array = np.full((3, trees.CHUNK), jnp.finfo(dtype).max, dtype)
    array[0, :2] = 0, jnp.finfo(dtype).tiny
    tree = {"a": np.ones(3, np.int8), "b": {"c": array}}
    assert trees.not_finite(tree) == ""
    array[1, 5], array[2, -2:] = np.nan, (np.inf, -np.inf)
    assert trees.not_finite(tree) == "3 of the numbers in b/c are infinite or NaN"
    if dtype != np.float64:
        assert (
            trees._total(trees._count_on_devices(jnp.asarray(array))) == 3
        )  # as on a GPU, or where other processes hold a part


def test_numbers_of_sharded_arrays_are_counted_once():
    mesh = meshes.make_mesh(data=2, tensor=2)
    array = np.ones((4, 6), np.float32)
    array[0, 0] = array[3, 5] = np.nan
    laid = jax.device_put(array, jax.NamedSharding(mesh, jax.P(None, "tensor")))
    assert trees.not_finite({"w": laid}) == "2 of the numbers in w are infinite or NaN"


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "float16", "bfloat16", "float32"])
def test_numbers_that_are_not_zero_are_counted_wherever_they_are(dtype):
    array = np.zeros((4, 6), jnp.dtype(dtype))
    array[0, 0] = array[3, 5] = array[1, 2] = 1
    if dtype not in ("bool", "uint8"):
        array[1, 2], array[2, 2] = -1, -0.0
    laid = jax.device_put(array, jax.NamedSharding(meshes.make_mesh(data=2, tensor=2), jax.P(None, "tensor")))
    assert trees.count_nonzero(array) == trees.count_nonzero(laid) == 3
    assert trees._total(trees._count_nonzero_on_devices(laid)) == 3
    np.testing.assert_array_equal(trees.on_host(laid), array)
    assert trees.equal(laid, array)
    assert trees._equal_on_devices(laid, laid)
    assert not trees.equal(laid, jnp.zeros_like(array))
    assert not trees.equal(array, array.astype(np.float64))


def test_more_numbers_than_an_int32_holds_are_counted():
    rows = jnp.full(3, 2**31 - 1, jnp.int32)  # of an array too large for a test
    assert trees._total(rows) == 3 * (2**31 - 1)
    assert trees._count_nonzero_on_devices(jnp.ones((4, 6))).tolist() == [6] * 4
