import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.ops.dot import dot_transposed


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows", [(), (5,), (2, 3)])
def test_dot_and_its_gradients_equal_float64(rng, dtype, tolerance, rows):
    x64, w64 = rng.standard_normal((*rows, 24)), rng.standard_normal((24, 17))
    x, w = jnp.asarray(x64, dtype), jnp.asarray(w64, dtype)
    x64, w64 = np.float64(x), np.float64(w)
    y, pull = jax.vjp(ops.dot, x, w)
    g64 = rng.standard_normal(y.shape)
    dx, dw = pull(jnp.asarray(g64, jnp.float32))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, x.dtype, w.dtype)
    close = lambda a, b: np.testing.assert_allclose(np.float64(a), b, atol=tolerance * np.abs(b).max())
    close(y, x64 @ w64)
    close(dx, g64 @ w64.T)
    close(dw, np.einsum("ri,ro->io", x64.reshape(-1, 24), g64.reshape(-1, 17)))


def products(jaxpr):
    """Every dot_general of a jaxpr, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from products(getattr(value, "jaxpr", value))


def test_both_gradient_products_have_bfloat16_operands_and_float32_sums():
    x, w = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((16, 4), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda x, w: ops.dot(x, w).sum(), argnums=(0, 1)))(x, w)
    found = list(products(program.jaxpr))
    assert len(found) == 3
    for equation in found:
        assert [operand.aval.dtype for operand in equation.invars] == [jnp.bfloat16] * 2
        assert equation.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_weights_equal_their_float_form(rng, transposed):
    x = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((17, 24) if transposed else (24, 17)), jnp.float32)
    q = ops.quantize_array(w, axis=1 if transposed else 0)
    product = dot_transposed if transposed else ops.dot
    np.testing.assert_allclose(product(x, q), product(x, ops.dequantize(q)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_activations_equal_an_integer_reference(rng, transposed):
    x = rng.standard_normal((2, 3, 24)).astype(np.float32)
    w = rng.standard_normal((17, 24) if transposed else (24, 17)).astype(np.float32)
    q = ops.quantize_array(jnp.asarray(w), axis=1 if transposed else 0, activations="int8")
    scale = np.abs(x).max(-1, keepdims=True) / 127
    integers = np.rint(x / scale).astype(np.int64)
    values = np.asarray(q.values, np.int64)
    total = integers @ (values.T if transposed else values)
    expected = total * scale * np.asarray(q.scale).reshape(1, 1, -1)
    product = dot_transposed if transposed else ops.dot
    np.testing.assert_allclose(product(jnp.asarray(x), q), expected, rtol=1e-5, atol=1e-5)
