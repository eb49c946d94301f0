"""Kernels on a mesh, interpreted on eight CPU devices: the model's gradients are those of the portable form."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.model import init_params
from efflm.ops.attention import KERNELS
from efflm.ops.kernels.cpu import build
from efflm.parallel import meshes, per_device, sharding
from efflm.train import losses
from efflm.train.step import place
from tests import tiny


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "length", "window", "shapes"),
    [
        # The queries and keys of a device's kernels, [K, group, T, H] of each.
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, 128, 0, {(1, 1, 2, 128, 8)}),
        tiny.combination({"tensor": 4}, 2, 128, 100, {(4, 1, 1, 128, 8)}),  # more devices than key-value heads
        tiny.combination({"sequence": 2}, 2, 512, 0, {(4, 2, 2, 128, 8)}),
        ({"sequence": 2, "data": 2}, 2, 512, 200, {(2, 2, 2, 128, 8)}),
    ],
)
def test_kernels_on_a_mesh_give_the_gradients_of_the_portable_form(monkeypatch, mesh, kv_heads, length, window, shapes):
    shape = dataclasses.replace(tiny.LLAMA, layers=1, kv_heads=kv_heads, window=window, max_length=length)
    config, mesh = shape.config(), meshes.make_mesh(**mesh)
    params, batch = init_params(config, 0), tiny.batch(config, rows=4, length=length)
    loss = losses.language_model_loss(config)

    def gradient(params, batch):
        return jax.grad(lambda params: loss(params, {}, batch, None)[0])(params)

    def on_mesh(params, batch):
        with sharding.on_mesh(mesh):
            return gradient(params, batch)

    with build.chosen("off"):
        want = jax.jit(gradient)(params, batch)
    seen, kernel = set(), KERNELS["tpu"]

    def interpreted(q_BTNH, k_BSKH, *arrays, **options):
        B, T, N, H = q_BTNH.shape
        seen.add((B, k_BSKH.shape[2], N // k_BSKH.shape[2], T, H))
        return kernel.attention(q_BTNH, k_BSKH, *arrays, **options, interpret=True)

    monkeypatch.setitem(KERNELS, "cpu", types.SimpleNamespace(takes=kernel.takes, attention=interpreted))
    got = jax.jit(on_mesh)(params, place(batch, mesh))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got, want)
    assert seen == shapes


@pytest.mark.usefixtures("native_kernels")
def test_queries_with_slots_stay_on_their_devices(rng):
    """A prompt's queries in a KV cache: the native kernel, which XLA's partitioner would give all of the cache."""
    shapes = ((4, 6, 4, 8), (4, 32, 2, 8), (4, 32, 2, 8))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    slots = jnp.asarray(rng.integers(0, 32, (4, 6)), jnp.int32)
    mesh = meshes.make_mesh(data=2, tensor=2)

    def attend(q, k, v, slots):
        return per_device.attention(q, k, v, None, slots_BT=slots, window=0)

    def on_mesh(*arguments):
        with sharding.on_mesh(mesh):
            return attend(*arguments)

    spread = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    arguments = [*(spread(x, ("data",), None, "tensor") for x in arrays), spread(slots, ("data",))]
    program = jax.jit(on_mesh).lower(*arguments).compile()
    assert "efflm_attention" in program.as_text()
    assert "all-gather" not in program.as_text()
    with build.chosen("off"):
        want = jax.jit(attend)(*arrays, slots)
    np.testing.assert_allclose(program(*arguments), want, atol=1e-5)
