import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.ops.dot import dot_transposed, transposed, weight_gradient

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


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


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 48, 64), (1, 7, 24, 5), (3, 33, 16, 40), (2, 1, 3, 5), (1, 16, 1, 1)])
def test_compiled_bfloat16_gradients_of_any_shape_sum_in_float32(rng, shape, transpose):
    B, T, K, N = shape
    x = jnp.asarray(rng.standard_normal((B, T, K)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((N, K) if transpose else (K, N)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((B, T, N)), jnp.float32)
    product = dot_transposed if transpose else ops.dot
    dx, dw = jax.jit(lambda x, w, g: jax.vjp(product, x, w)[1](g))(x, w, g)
    low = lambda array: np.float64(array.astype(jnp.bfloat16))
    expected = np.einsum("btk,btn->kn", low(x), low(g))
    assert dw.dtype == jnp.float32  # of float32 masters: not rounded to the operands' dtype on the way
    np.testing.assert_allclose(dw.T if transpose else dw, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    expected = np.einsum("btn,kn->btk", low(g), low(w.T if transpose else w))
    np.testing.assert_allclose(np.float64(dx), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(32, 48), (7, 32), (32, 7), (5, 3), (2, 3, 16, 9)])
def test_transposed_only_swaps_the_last_axes(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(transposed)(x), x.swapaxes(-1, -2))


@pytest.mark.skipif("avx512_bf16" not in CPU, reason="the kernels differ from CPU to CPU")
def test_the_compiled_weight_gradient_multiplies_bfloat16():
    x, g = jax.ShapeDtypeStruct((8, 256, 384), jnp.bfloat16), jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16)
    program = jax.jit(weight_gradient).lower(x, g).compile().as_text()
    (left,) = re.findall(r"dot\(%?(\w[\w.]*)", program)
    assert re.search(rf"%?{re.escape(left)} = bf16\[|%?{re.escape(left)}: bf16\[", program)


FORMS = [
    {"activations": activations, "bits": bits, "group": group, "symmetric": symmetric, "super_block": super_block}
    for activations in ("float", "int8", "int8_static")
    for bits, group, symmetric, super_block in (
        (8, 0, True, 0),
        (8, 10, False, 0),
        (4, 8, False, 256),
        (3, 0, False, 0),
        (2, 10, True, 0),
    )
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_quantized_matmuls_equal_a_float64_reference(rng, transposed, form):
    x = rng.standard_normal((2, 3, 24)).astype(np.float32)
    w = rng.standard_normal((17, 24) if transposed else (24, 17)).astype(np.float32)
    static = np.full((1, 1), 0.02, np.float32) if form["activations"] == "int8_static" else None
    q = ops.quantize_array(jnp.asarray(w), 1 if transposed else 0, ops.Format(**form), activation_scale=static)
    read = np.float64(x)
    if form["activations"] != "float":
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127) if static is None else static
        read = np.clip(np.rint(x / scale), -127, 127) * np.float64(scale)
    floats = np.float64(ops.dequantize(q))
    expected = read @ (floats.T if transposed else floats)
    product = dot_transposed if transposed else ops.dot
    np.testing.assert_allclose(product(jnp.asarray(x), q), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_quantized_along_its_outputs_is_multiplied_as_floats(rng, transposed):
    x = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((17, 24) if transposed else (24, 17)), jnp.float32)
    q = ops.quantize_array(w, 0 if transposed else 1, ops.Format(activations="int8", bits=4))
    product = dot_transposed if transposed else ops.dot
    np.testing.assert_allclose(product(x, q), product(x, ops.dequantize(q)), rtol=1e-5, atol=1e-5)
