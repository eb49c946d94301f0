"""Kernels compared with the portable form, interpreted on the CPU; and found in the programs lowered for a platform."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, SingleDeviceSharding

from efflm import ops
from efflm.ops.attention import KERNELS, kernel_for
from efflm.ops.kernels import Attention
from efflm.ops.kernels.cpu import build
from tests import tiny

CALLS = {"tpu": ("tpu_custom_call", "splash"), "cuda": ("triton", "mha")}  # what their programs hold


@pytest.fixture
def interpreted(monkeypatch, request):
    """The CPU runs the interpreted kernel of the platform that the test is given."""

    def use(platform):
        kernels = KERNELS[platform]
        called = types.SimpleNamespace(
            takes=kernels.takes, attention=functools.partial(kernels.attention, interpret=True)
        )
        monkeypatch.setitem(KERNELS, "cpu", called)

    return use


def draw(rng, B, T, S, N, K, H, dtype=jnp.bfloat16):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def packed(rng, B, T):
    """Documents 1, 2, ... in order, then padding, 0."""
    segments = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segments[:, -T // 8 :] = 0
    return jnp.asarray(segments, jnp.int32)


def with_gradients(attend, q, k, v, g):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g.astype(jnp.float32))


def assert_close(got, want):
    """To the rounding of bfloat16, of which every array here holds values of about one."""
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
        assert np.abs(a - b).mean() < 0.01 * np.abs(b).mean() + 1e-6


@pytest.mark.parametrize(
    ("platform", "lengths", "heads", "H", "window", "segments"),
    [
        tiny.combination("tpu", (256, 256), (4, 2), 64, 0, True),
        ("tpu", (256, 256), (2, 2), 80, 100, True),
        ("tpu", (128, 384), (2, 1), 64, 200, True),  # the last queries of longer keys
        tiny.combination("tpu", (128, 128), (2, 1), 64, 0, False),
        ("cuda", (256, 256), (4, 2), 64, 0, True),
        ("cuda", (128, 128), (2, 1), 80, 0, False),
    ],
)
def test_a_kernel_equals_the_portable_form(rng, interpreted, platform, lengths, heads, H, window, segments):
    (T, S), (N, K), B = lengths, heads, 2
    *arrays, g = draw(rng, B, T, S, N, K, H)
    keys = packed(rng, B, S) if segments else None
    segments_BT = keys if keys is None else keys[:, S - T :]
    where = {"segments_BT": segments_BT, "window": window} | ({"key_segments_BS": keys} if S != T else {})
    compiled_anew = lambda: jax.jit(lambda *arrays: with_gradients(functools.partial(ops.attention, **where), *arrays))
    with build.chosen("off"):
        want = compiled_anew()(*arrays, g)
    interpreted(platform)
    run = compiled_anew()
    assert "pallas_call" in str(jax.make_jaxpr(run)(*arrays, g))
    got = run(*arrays, g)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    assert_close(got, want)


def test_a_float32_kernel_is_as_exact_as_the_portable_form(rng, interpreted):
    *arrays, g = draw(rng, 1, 256, 256, 2, 1, 16, jnp.float32)
    attend = functools.partial(ops.attention, segments_BT=packed(rng, 1, 256), window=70)
    with build.chosen("off"):
        want = jax.jit(functools.partial(with_gradients, attend))(*arrays, g)
    interpreted("tpu")
    run = jax.jit(functools.partial(with_gradients, attend))
    assert "pallas_call" in str(jax.make_jaxpr(run)(*arrays, g))
    got = run(*arrays, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "call", "taken"),
    [
        ("tpu", {}, True),
        ("tpu", {"window": 100, "keys": 1024, "own_segments": False}, True),
        ("tpu", {"dtype": jnp.float32}, True),
        ("tpu", {"dtype": jnp.float16}, False),
        ("tpu", {"queries": 130, "keys": 130}, False),
        ("tpu", {"keys": 300}, False),
        ("tpu", {"head_dim": 20}, False),
        ("tpu", {"in_order": False}, False),
        ("cuda", {}, True),
        ("cuda", {"dtype": jnp.float32}, False),
        ("cuda", {"dtype": jnp.float16}, False),
        ("cuda", {"window": 100}, False),
        ("cuda", {"keys": 1024}, False),
        ("cuda", {"own_segments": False}, False),
        ("cuda", {"queries": 100, "keys": 100}, False),
        ("cuda", {"head_dim": 256}, False),
        ("cuda", {"in_order": False}, False),
        ("rocm", {}, False),
    ],
)
def test_what_a_kernel_takes(platform, call, taken):
    usual = {"queries": 512, "keys": 512, "head_dim": 64, "dtype": jnp.bfloat16}
    assert (kernel_for(platform, Attention(**usual | call)) is not None) == taken


def lowered(platform, f, *arguments):
    """The text of the program for a platform that is not attached."""
    mesh = jax.sharding.get_abstract_mesh()
    if platform == "cuda" and jax.__version_info__ >= (0, 11):  # it must be told the kind of GPU
        device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
        mesh = mesh.update(abstract_device=device) if not mesh.empty else AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu", "cpu without native kernels"])
def test_the_program_of_a_platform_holds_its_kernel(platform, request):
    platform, _, without = platform.partition(" ")
    native = platform == "cpu" and not without
    if native:
        request.getfixturevalue("native_kernels")
    with build.chosen("off" if without else "auto"):
        check_program(platform, native)


def check_program(platform, native):
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    loss = lambda q, k, v, segments: jnp.sum(ops.attention(q, k, v, segments_BT=segments))
    text = lowered(platform, jax.grad(loss, (0, 1, 2)), q, k, k, segments)
    for name, (call, kernel) in CALLS.items():
        assert (call in text and kernel in text) == (name == platform)
    # The portable form is left out where the kernel is in: there is no softmax outside of it.
    assert ("stablehlo.exponential" in text) == (platform == "cpu" and not native)
    assert ("efflm_attention" in text) == native
    cached = lowered(platform, lambda q, k, slots: ops.attention(q, k, k, slots_BT=slots), q, k, segments)
    assert not any(call in cached for call, _ in CALLS.values())
    assert ("efflm_attention" in cached) == native


@pytest.mark.parametrize(("window", "H"), [(0, 64), (100, 80)])
def test_the_tpu_program_compiles(monkeypatch, window, H):
    """With TPU's own compiler, which needs no TPU. Mosaic takes the kernels' layouts, and no scores are held."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    B, T, N, K = 1, 1024, 4, 2
    on_device = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    q, k = (on_device((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
    attend = functools.partial(ops.attention, window=window)
    gradients = jax.grad(lambda q, k, v, segments: jnp.sum(attend(q, k, v, segments_BT=segments)), (0, 1, 2))
    program = jax.jit(gradients).lower(q, k, k, on_device((B, T), jnp.int32)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3  # forward, and twice backward
    assert program.memory_analysis().temp_size_in_bytes < B * N * T * T * 4
