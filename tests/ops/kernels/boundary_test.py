"""Arrays that do not fit are refused before a native kernel reads or writes outside of them: in Python by their names
and shapes, and what reaches the kernels by these themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.ops.kernels.cpu import attention, build, decode, dot

pytestmark = pytest.mark.usefixtures("native_kernels")
ones = lambda *shape: jnp.ones(shape, jnp.float32)
places = lambda *shape: jnp.zeros(shape, jnp.int32)


def quantized(w, axis=-2, **format):
    return ops.quantize_array(w, axis, ops.Format(**format))


def prepared(w):
    return ops.prepare({"w": w}, "cpu")["w"]


def both():
    """A matrix [8, 3] of floats and one of int8, laid out."""
    return [prepared(ones(8, 3)), prepared(quantized(ones(8, 3)))]


def test_shapes_of_matmuls_are_refused_by_name():
    for w in both():
        for call, words in [
            (lambda w: ops.dot(ones(1, 9), w), r"rows of shape \(1, 9\) have 9 entries each, but the matrix \(8, 3\)"),
            (lambda w: ops.dots(ones(1, 9), (w, w)), "have 9 entries"),
            (
                lambda w: ops.dot(ones(2, 8), w, ones(1, 3)),
                r"the residual has shape \(1, 3\), but the product \(2, 3\)",
            ),
            (lambda w: ops.dot(ones(2, 8), w, ones(2, 4)), r"the residual has shape \(2, 4\)"),
            (lambda w: ops.dot(ops.Normed(ones(1, 8), ones(7)), w), r"the scale of a norm has shape \(7,\)"),
            (lambda w: ops.dot(ops.Normed(ones(1, 8), ones(8), ones(1)), w), r"the bias of a norm has shape \(1,\)"),
            (lambda w: ops.gated_feedforward(ones(1, 8), w, prepared(ones(8, 4)), w, ones(1, 8), jnp.float32), "gates"),
            (lambda w: ops.gated_feedforward(ones(1, 8), w, w, w, ones(1, 8), jnp.float32), r"\(1, 3\) have 3 entries"),
        ]:
            with pytest.raises(ValueError, match=words):
                call(w)
    with pytest.raises(ValueError, match=r"have 8 entries each, but the matrix \(3, 8\)"):
        ops.unembed(ones(1, 8), prepared(ones(8, 3)))  # a matrix that is not transposed, used as if it were


@pytest.mark.parametrize("format", [{}, {"bits": 4, "group": 8}, {"activations": "int8"}], ids=["8", "4", "a8"])
def test_a_matrix_quantized_along_the_other_axis_is_multiplied_right(rng, format):
    """No kernel takes it: the portable form does, and looks its rows up."""
    w = jnp.asarray(rng.standard_normal((24, 40)), jnp.float32)
    for axis, product, K in ((-1, ops.dot, 24), (-2, ops.unembed, 40)):
        leaf = quantized(w, axis, **format)
        x = jnp.asarray(rng.standard_normal((2, K)), jnp.float32)
        assert isinstance(prepared(leaf), dot.Panels)
        np.testing.assert_allclose(product(x, prepared(leaf)), product(x, leaf), rtol=1e-4, atol=1e-4)
        tokens = jnp.asarray([[0, 23], [7, 7]])
        found = ops.embed(prepared(leaf), tokens, jnp.float32)
        np.testing.assert_allclose(found, ops.embed(leaf, tokens, jnp.float32), rtol=1e-6)


def test_more_weights_than_one_call_takes(rng):
    x = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    matrices = [jnp.asarray(rng.standard_normal((8, n)), jnp.float32) for n in range(3, 22)]
    for out, w in zip(ops.dots(x, [prepared(w) for w in matrices]), matrices, strict=True):
        np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-5)


def test_shapes_of_attention_are_refused_by_name():
    q, k = ones(2, 4, 4, 8), ones(2, 4, 2, 8)
    for arrays, where, words in [
        ((ones(2, 4, 3, 8), k, k), {}, "3 query heads cannot be shared among 2 key-value heads"),
        ((q, ones(2, 4, 0, 8), ones(2, 4, 0, 8)), {}, "among 0 key-value heads"),
        ((q, ones(2, 4, 2, 7), ones(2, 4, 2, 7)), {}, "do not fit: batch and head size"),
        ((q, k[:1], k[:1]), {}, "do not fit: batch and head size"),
        ((q, k, ones(2, 5, 2, 8)), {}, "do not fit"),
        ((q, k[:, :3], k[:, :3]), {}, "there are 4 queries and 3 keys"),
        ((q, k[:, :0], k[:, :0]), {"slots_BT": places(2, 4)}, "and 0 keys"),
        ((q, k, k), {"slots_BT": places(2, 3)}, r"slots have shape \(2, 3\), but must have \(2, 4\)"),
        ((q, k, k), {"segments_BT": places(3, 4)}, "segments have shape"),
        ((q, k, k), {"segments_BT": places(2, 4), "key_segments_BS": places(2, 5)}, "segments of the keys have shape"),
        ((q[:, :3], k, k), {"segments_BT": places(2, 3)}, "segments of the keys have shape"),
        ((q, k, k), {"key_segments_BS": places(2, 4)}, "segments of the keys are given, but none of the queries"),
    ]:
        with pytest.raises(ValueError, match=words):
            ops.attention(*arrays, **where)


def test_shapes_of_cached_attention_are_refused_by_name():
    usual = [
        ones(2, 3, 4, 8),
        ones(2, 3, 2, 8),
        ones(2, 3, 2, 8),
        ones(2, 9, 2, 8),
        ones(2, 9, 2, 8),
        places(2, 3),
        None,
    ]
    for changed, words in [
        ({0: ones(2, 3, 5, 8)}, "5 query heads cannot be shared among 2"),
        ({2: ones(2, 3, 2, 7)}, "do not fit: batch and head size"),
        ({3: ones(2, 9, 1, 8)}, "do not fit caches of"),
        ({4: ones(2, 8, 2, 8)}, "do not fit caches of"),
        ({3: ones(2, 2, 2, 8), 4: ones(2, 2, 2, 8)}, "3 new positions do not fit a cache of 2"),
        ({5: places(2, 4)}, r"positions and rotations of shapes \[\(2, 4\)\]"),
        ({6: (ones(2, 3, 5), ones(2, 3, 5))}, "positions and rotations"),
    ]:
        arrays = [changed.get(i, array) for i, array in enumerate(usual)]
        with pytest.raises(ValueError, match=words):
            ops.cached_attention(*arrays, dtype=jnp.float32)


def refused(call, *arguments, **options):
    with pytest.raises(Exception, match="a CPU kernel was called with") as caught:
        jax.block_until_ready(call(*arguments, **options))
    return str(caught.value)


def test_the_matmul_kernels_refuse_what_does_not_fit():
    out = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def products(x, weights, *outs, residual=None, transposed=False):
        return dot._call("efflm_dots", x, weights, residual, transposed, list(outs))

    for w in both():
        refused(products, ones(1, 17), [w], out(1, 3))
        assert "an output of shape [2, 3]" in refused(products, ones(1, 8), [w], out(2, 3))
        assert "a residual of shape [1, 2]" in refused(products, ones(1, 8), [w], out(1, 3), residual=ones(1, 2))
        normed = ops.Normed(ones(1, 8), ones(7))
        assert "a scale of a norm of shape [7]" in refused(products, normed, [w], out(1, 3))
        assert "a bias of a norm" in refused(products, ops.Normed(ones(1, 8), ones(8), ones(9)), [w], out(1, 3))
        assert "more than 8 weights" in refused(products, ones(1, 8), [w] * 9, *[out(1, 3)] * 9)
        assert "an output" in refused(products, ones(1, 0), [w], out(1, 3))
    dense, panels = both()
    refused(products, ones(1, 3), [dense], out(1, 8), transposed=False)
    refused(products, ones(1, 8), [dense], out(1, 3), transposed=True)
    refused(products, ones(1, 40), [panels], out(1, 3))
    refused(products, ones(1, 8), [panels], out(1, 33))
    refused(products, ones(1, 8), [panels.replace(scale=ones(1, 31))], out(1, 3))
    refused(products, ones(1, 8), [panels.replace(zeros=jnp.zeros((1, 31), jnp.int8))], out(1, 3))
    refused(products, ones(1, 8), [panels.replace(values=panels.values.astype(jnp.int32))], out(1, 3))
    assert "no multiple of 8" in refused(products, ones(1, 8), [panels.replace(group=3)], out(1, 3))

    def gated(x, *weights, residual=None, hidden=3, activation=0):
        extra = (hidden, activation)
        return dot._call("efflm_feedforward", x, weights, residual, False, out(1, 8), extra=extra)

    back = prepared(ones(3, 8))
    refused(gated, ones(1, 8), dense, dense, dense)
    refused(gated, ones(1, 8), dense, dense, back, hidden=4)
    assert "an unknown activation" in refused(gated, ones(1, 8), dense, dense, back, activation=2)
    refused(gated, ones(1, 9), dense, panels, back)
    refused(gated, ones(1, 8), dense, dense, back, residual=ones(1, 7))
    refused(gated, ones(2, 8), dense, dense, back)


def test_the_attention_kernels_refuse_what_does_not_fit(rng):
    q, k, none, form = ones(1, 4, 4, 8), ones(1, 4, 2, 8), places(1, 0), build.form()

    def attend(q=q, k=k, v=None, slots=none, segments=none, key_segments=none, window=0):
        results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((1, q.shape[2], 4), jnp.float32)
        arrays = (q, k, k if v is None else v, slots, segments, key_segments)
        return attention._call("efflm_attention", form, results, arrays, window=np.int64(window))

    jax.block_until_ready(attend())
    refused(attend, q=ones(1, 4, 3, 8))
    refused(attend, k=ones(1, 4, 2, 7))
    refused(attend, v=ones(1, 3, 2, 8))
    refused(attend, k=ones(2, 4, 2, 8))
    refused(attend, k=ones(1, 3, 2, 8))
    refused(attend, q=q.astype(jnp.float16))
    refused(attend, q=ones(1, 5, 4, 8), k=ones(1, 5, 2, 8))  # as many normalizers as for 4 queries
    refused(attend, slots=places(1, 3))
    refused(attend, segments=places(1, 4))
    refused(attend, segments=places(1, 4), key_segments=places(1, 3))
    refused(attend, window=-1)

    def attend_back(q=q, k=k, g=q, dtype=jnp.float32, chunks=1, key_gradients=k):
        results = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (q, key_gradients, k)]
        inputs = (q, k, k, none, none, none, q, ones(1, 4, q.shape[1]), g)
        options = {"window": np.int64(0), "chunks": np.int64(chunks)}
        return attention._call("efflm_attention_backward", form, tuple(results), inputs, **options)

    jax.block_until_ready(attend_back())
    refused(attend_back, g=ones(1, 4, 4, 7))
    refused(attend_back, chunks=0)
    refused(attend_back, chunks=2, dtype=jnp.bfloat16)
    refused(attend_back, key_gradients=ones(1, 3, 2, 8))
    _, dk, dv = attend_back(q=q[:, :0], g=q[:, :0])
    assert not np.any(dk)
    assert not np.any(dv)


def test_the_decode_kernel_refuses_what_does_not_fit():
    usual = {"q": ones(2, 3, 4, 8), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 8), "keys": ones(2, 9, 2, 8)}
    usual |= {"values": ones(2, 9, 2, 8), "positions": places(2, 3), "rotary": (ones(2, 3, 4), ones(2, 3, 4))}

    def attend(window=0, **changed):
        return decode.attention(*(usual | changed).values(), dtype=jnp.float32, window=window, form=build.form())

    jax.block_until_ready(attend())
    for changed in [
        {"q": ones(2, 3, 5, 8)},
        {"q": ones(1, 3, 4, 8)},
        {"k": ones(2, 3, 2, 7)},
        {"v": ones(2, 2, 2, 8)},
        {"values": ones(2, 8, 2, 8)},
        {"keys": ones(2, 2, 2, 8), "values": ones(2, 2, 2, 8)},
        {"keys": ones(2, 9, 2, 8).astype(jnp.float16)},
        {"keys": ones(2, 9, 2, 8).astype(jnp.bfloat16)},
        {"positions": places(2, 2)},
        {"rotary": (ones(2, 3, 5), ones(2, 3, 5))},
        {"rotary": (ones(2, 3, 4), ones(2, 3, 3))},
        {"window": -1},
    ]:
        refused(attend, **changed)
