"""Kernels on a mesh, interpreted on eight CPU devices: the model's gradients are those of the portable form."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from efflm.model import init_params, sharding
from efflm.ops.attention import KERNELS
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
    config, mesh = shape.config(), sharding.make_mesh(**mesh)
    params, batch = init_params(config, 0), tiny.batch(config, rows=4, length=length)
    loss = losses.language_model_loss(config)

    def gradient(params, batch):
        return jax.grad(lambda params: loss(params, {}, batch, None)[0])(params)

    def on_mesh(params, batch):
        with sharding.on_mesh(mesh):
            return gradient(params, batch)

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
