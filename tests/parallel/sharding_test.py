import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.model import init_params, placement, stack_blocks
from efflm.parallel import meshes, sharding
from efflm.train import optimizer
from tests import tiny

MESH = meshes.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_leaf_of_every_family_has_a_rule(name):
    model = tiny.model(tiny.FAMILIES[name])
    placement.shardings(model.params, MESH)
    placement.shardings(stack_blocks(model.params, model.config), MESH)
    placement.shardings(quantize(model.params), MESH)


def test_an_unmatched_leaf_is_an_error():
    with pytest.raises(ValueError, match=r"block_0/mystery of shape .* is no weight of a model"):
        placement.partition_spec("block_0/mystery", (4, 4), MESH)


def test_specs_follow_the_table():
    spec = lambda path, *shape: placement.partition_spec(path, shape, MESH)
    assert spec("block_0/attention/query/kernel", 32, 32) == PartitionSpec("fsdp", "tensor")
    assert spec("block_0/attention/output/kernel", 32, 32) == PartitionSpec("tensor", "fsdp")
    assert spec("embedding", 300, 32) == PartitionSpec("tensor", "fsdp")
    assert spec("embedding", 301, 32) == PartitionSpec(None, "fsdp")  # 301 does not divide: replicated
    assert spec("blocks_12/feedforward/down/kernel", 3, 48, 32) == PartitionSpec(None, "tensor", "fsdp")
    assert spec("block_0/feedforward/up/kernel/scale", 1, 48) == PartitionSpec(None, "tensor")
    assert spec("optimizer/mu/hidden_projection/block_0", 32, 24) == PartitionSpec("fsdp", None)


def test_fresh_weights_are_the_same_made_in_parts():
    whole, parts = init_params(tiny.LLAMA.config(), 3), init_params(tiny.LLAMA.config(), 3, MESH)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert jax.tree.map(lambda leaf: leaf.sharding, parts) == placement.shardings(parts, MESH)


def test_moments_lie_like_their_weights():
    params = tiny.model().params
    state = jax.eval_shape(optimizer.make(TrainConfig()).init, params)
    weights, moments = placement.shardings(params, MESH), placement.shardings(state, MESH)
    adam = moments[1][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(weights) == jax.tree.leaves(adam.nu)


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (4, 4), (6, 2), (7, 1)])
def test_data_parallel_takes_as_many_devices_as_divide_the_batch(batch, devices):
    for mesh in (meshes.data_parallel(batch), meshes.mesh_for(MeshConfig(), batch, 16)):
        assert dict(mesh.shape) == {"data": devices, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(("batch", "parts", "devices"), [(16, 2, 8), (8, 2, 4), (8, 8, 1)])
def test_devices_share_each_part_of_a_batch(batch, parts, devices, capsys):
    assert meshes.data_parallel(batch, parts).size == devices
    assert meshes.mesh_for(MeshConfig(), batch, 16, parts).shape["data"] == devices
    idle = f"note: {8 - devices} of 8 devices have no work: a batch of {batch} rows in {parts} parts"
    assert (idle in capsys.readouterr().err) == (devices < 8)
    with pytest.raises(
        InputError, match=r"8 rows in 2 parts \(accumulate\) cannot be shared by mesh.data 8 x mesh.fsdp 1"
    ):
        meshes.mesh_for(MeshConfig(data=8), 8, 16, 2)


def test_an_axis_takes_the_devices_that_are_left():
    shape = lambda batch, **sizes: tuple(meshes.mesh_for(MeshConfig(**sizes), batch, 16).shape.values())
    assert shape(8, fsdp=4) == (2, 4, 1, 1)
    assert shape(4, fsdp=4) == (1, 4, 1, 1)  # two copies would not divide the batch
    assert shape(8, data=2, tensor=-1) == (2, 1, 1, 4)
    assert shape(8, data=1, fsdp=-1, sequence=2) == (1, 4, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ({"fsdp": 16}, 8, r"mesh.data=-1, mesh.fsdp=16 asks for 16 devices, but there are 8"),
        ({"tensor": 3}, 8, r"8 devices are not divisible by 3"),
        ({"fsdp": 4}, 6, r"a batch of 6 rows cannot be shared by mesh.data 1 x mesh.fsdp 4"),
        ({"data": 1, "sequence": -1}, 8, r"rows of 12 tokens are not divisible by twice mesh.sequence 8"),
        ({"fsdp": -1}, 8, r"mesh.data and mesh.fsdp are -1"),
        ({"tensor": 0}, 8, r"mesh.tensor is 0"),
    ],
)
def test_impossible_meshes_are_refused(sizes, batch, message):
    with pytest.raises(InputError, match=message):
        meshes.mesh_for(MeshConfig(**sizes), batch, 12)


def test_sharded_forward_equals_unsharded():
    from efflm.model import Transformer

    model = tiny.model()
    tokens = jnp.asarray(tiny.tokens(model.config, 4, 8))
    apply = jax.jit(lambda params, tokens: Transformer(model.config).apply({"params": params}, tokens)[0])
    sharded = jax.device_put(model.params, placement.shardings(model.params, MESH))
    rows = jax.device_put(tokens, jax.NamedSharding(MESH, sharding.BATCH))
    np.testing.assert_allclose(apply(sharded, rows), apply(model.params, tokens), rtol=1e-5, atol=1e-5)
