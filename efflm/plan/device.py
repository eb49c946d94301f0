"""What one device of a mesh has of a model and of a batch, by the sharding table: the mesh needs no devices, nothing is
compiled, and arrays exist as shapes only."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from efflm import trees
from efflm.config.model import BlockConfig, ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import params, placement
from efflm.parallel import meshes
from efflm.plan import work
from efflm.precision import POLICIES, Policy
from efflm.train import aot, trainer
from efflm.train.step import TrainState


def abstract_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, sequence, tensor), meshes.AXES)


def group(axes: tuple[str, ...], mesh: AbstractMesh) -> tuple[int, ...]:
    """The devices that share all coordinates with device 0 but those of `axes`."""
    sides = [mesh.shape[name] for name in meshes.AXES]
    index = tuple(slice(None) if name in axes else 0 for name in meshes.AXES)
    return tuple(np.arange(math.prod(sides)).reshape(sides)[index].ravel().tolist())


def rows_and_length(batch: int, length: int, mesh: AbstractMesh) -> tuple[int, int]:
    """What one device reads of a batch."""
    return batch // (mesh.shape["data"] * mesh.shape["fsdp"]), length // mesh.shape["sequence"]


def local(config: ModelConfig, mesh: AbstractMesh) -> ModelConfig:
    """The model that one device computes: its heads, its part of the feed-forward width and of the vocabulary."""
    n = mesh.shape["tensor"]
    cut = lambda size: size // n if size % n == 0 else size

    def part(block: BlockConfig) -> BlockConfig:
        heads, kv_heads = cut(block.heads), block.kv_heads
        if heads < block.heads:  # at least one: where there are fewer than devices, several compute the same
            kv_heads = max(1, kv_heads // n) if kv_heads % n == 0 or n % kv_heads == 0 else heads
        return dataclasses.replace(block, heads=heads, kv_heads=kv_heads, mlp_dim=cut(block.mlp_dim))

    return dataclasses.replace(config, vocabulary=cut(config.vocabulary), blocks=tuple(map(part, config.blocks)))


# --- weights and state -----------------------------------------------------------------------------------------------


def parts(path: str, shape: tuple[int, ...], mesh: AbstractMesh, axes: tuple[str, ...] = meshes.AXES) -> int:
    """Into how many parts the mesh axes `axes` cut a leaf; each device holds one."""
    return math.prod(mesh.shape[axis] for axis in placement.partition_spec(path, shape, mesh) if axis in axes)


def tree_bytes(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes of an abstract tree, compressed weights included, on one device."""
    leaves = trees.flatten(tree, inside=True)
    return sum(leaf.size * leaf.dtype.itemsize // parts(path, leaf.shape, mesh) for path, leaf in leaves)


@functools.cache  # a search asks the same of many meshes
def gathered(config: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """{path: weights that a matmul on one device reads} of those that fsdp cuts: cut along tensor alone."""
    shapes = {path: param.shape for path, param in params.table(config).items()}
    cut = {path: shape for path, shape in shapes.items() if parts(path, shape, mesh, ("fsdp",)) > 1}
    return {path: math.prod(shape) // parts(path, shape, mesh, ("tensor",)) for path, shape in cut.items()}


def state(config: ModelConfig, train: TrainConfig) -> TrainState:
    """What training holds between steps, as shapes."""
    return _state(config, TrainConfig(optimizer=train.optimizer, policy=train.policy, scan=train.scan))


@functools.cache
def _state(config: ModelConfig, train: TrainConfig) -> TrainState:
    return trainer.prepared(aot.random_task(config, train), abstract_mesh())[0]


def gradient_bytes(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> float:
    """Of all weights, in float32, on one device."""
    return tree_bytes(state(config, train).trainable, mesh) * work.FLOAT / work.ITEMSIZE[POLICIES[train.policy].param]


def stored_bytes(config: ModelConfig, train: TrainConfig, rows: int, length: int) -> float:
    """What the forward pass of `rows` sequences hands to the backward pass: the arrays that jax.vjp keeps, without
    those that do not grow with the rows, such as weights. A compiler may keep fewer, or one twice."""
    alike = TrainConfig(policy=train.policy, scan=train.scan, remat=train.remat, length=length)
    return rows * _stored_of_a_row(config, alike)


@functools.cache
def _stored_of_a_row(config: ModelConfig, train: TrainConfig) -> float:
    loss_fn = aot.random_task(config, train).loss_fn

    def kept(rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, train.length), jnp.int32)
        batch = dict.fromkeys(aot.random_rows(1, 1, config.vocabulary), tokens)
        pull = lambda weights, batch, key: jax.vjp(lambda w: loss_fn(w, {}, batch, key)[0], weights)[1]
        key = jax.eval_shape(lambda: jax.random.key(0))
        return trees.nbytes(jax.tree.leaves(jax.eval_shape(pull, state(config, train).trainable, batch, key)))

    return kept(2) - kept(1)


# --- bytes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device by kind. arguments: of the program, exactly. besides: what it makes, of which the
    largest is counted: they are not all there at once."""

    arguments: dict[str, float]
    besides: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.arguments.values()) + max(self.besides.values(), default=0.0)


def held(config: ModelConfig, train: TrainConfig, mesh: AbstractMesh) -> Held:
    """Of a training step. Under fsdp=N, a leaf whose width N divides costs 1/N, any other costs itself (ZeRO stage 3,
    Rajbhandari 2019, arXiv 1910.02054, section 5)."""
    whole, (rows, length) = state(config, train), rows_and_length(train.batch, train.length, mesh)
    return Held(
        {
            "weights": tree_bytes(whole.trainable, mesh),
            "optimizer state": tree_bytes(whole.optimizer, mesh),
            "batch": 4 * 4 * rows * length,  # four int32 for each token
        },
        {
            "gradients": gradient_bytes(config, train, mesh),
            "stored activations": stored_bytes(local(config, mesh), train, rows // train.accumulate, train.length)
            / mesh.shape["sequence"],
        },
    )


def served(
    weights: Any, config: ModelConfig, phase: str, rows: int, length: int, policy: Policy, mesh: AbstractMesh
) -> Held:
    """Of prefill, which makes the cache, or of decode, which is given it. weights: abstract, perhaps compressed."""
    n, (rows, _) = mesh.shape["tensor"], rows_and_length(rows, length, mesh)
    heads = lambda block: block.kv_heads // n if block.kv_heads % n == 0 else block.kv_heads  # as infer.aot has them
    blocks = tuple(dataclasses.replace(block, kv_heads=heads(block)) for block in config.blocks)
    cache = work.kv_cache_bytes(dataclasses.replace(config, blocks=blocks), rows, length, policy)
    given, made = ({"keys and values": cache}, {}) if phase == "decode" else ({}, {"keys and values": cache})
    return Held({"weights": tree_bytes(weights, mesh)} | given, made)
