"""What one device of a mesh has of a model and of a batch, by the sharding table; the mesh needs no devices."""

import collections
import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from efflm import trees
from efflm.config.model import BlockConfig, ModelConfig
from efflm.model import cost, placement
from efflm.parallel import meshes

shapes = functools.cache(cost.shapes)  # a search asks the same of many meshes


def abstract_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, sequence, tensor), meshes.AXES)


def group(axes: tuple[str, ...], mesh: AbstractMesh) -> tuple[int, ...]:
    """The devices that share all coordinates with device 0 but those of `axes`."""
    sides = [mesh.shape[name] for name in meshes.AXES]
    index = tuple(slice(None) if name in axes else 0 for name in meshes.AXES)
    return tuple(np.arange(math.prod(sides)).reshape(sides)[index].ravel().tolist())


# --- weights ---------------------------------------------------------------------------------------------------------


def parts(path: str, shape: tuple[int, ...], mesh: AbstractMesh, axes: tuple[str, ...] = meshes.AXES) -> int:
    """Into how many parts the mesh axes `axes` cut a leaf; each device holds one."""
    return math.prod(mesh.shape[axis] for axis in placement.partition_spec(path, shape, mesh) if axis in axes)


@functools.cache
def weight_count(config: ModelConfig, mesh: AbstractMesh) -> int:
    """Weights on one device."""
    return sum(math.prod(shape) // parts(path, shape, mesh) for path, shape in shapes(config).items())


@functools.cache
def gathered(config: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """{path: weights that a matmul on one device reads}: gathered along fsdp, cut along tensor."""
    return {path: math.prod(shape) // parts(path, shape, mesh, ("tensor",)) for path, shape in shapes(config).items()}


@functools.cache
def gathered_along_fsdp(config: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Those of `gathered` of which a device holds only a part."""
    fsdp = lambda path: parts(path, shapes(config)[path], mesh, ("fsdp",))
    return {path: count for path, count in gathered(config, mesh).items() if fsdp(path) > 1}


@functools.cache
def largest_layer(config: ModelConfig, mesh: AbstractMesh) -> int:
    """The weights that the matmuls of the largest layer read on one device."""
    counts: collections.Counter[str] = collections.Counter()
    for path, count in gathered(config, mesh).items():
        if path.startswith("block_"):
            counts[path.split("/")[0]] += count
    return max(counts.values())


def tree_bytes(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes of an abstract tree, compressed weights included, on one device."""
    leaves = trees.flatten(tree, inside=True)
    return sum(leaf.size * leaf.dtype.itemsize // parts(path, leaf.shape, mesh) for path, leaf in leaves)


# --- computation -----------------------------------------------------------------------------------------------------


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
            fits = kv_heads % n == 0 or n % kv_heads == 0
            kv_heads = max(1, kv_heads // n) if fits else heads
        return dataclasses.replace(block, heads=heads, kv_heads=kv_heads, mlp_dim=cut(block.mlp_dim))

    return dataclasses.replace(config, vocabulary=cut(config.vocabulary), blocks=tuple(map(part, config.blocks)))
