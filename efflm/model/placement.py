"""How a tree of weights is sharded over a mesh: leaf path -> named axes (model.params) -> mesh axes.

A matrix that is no weight is an error. An axis that does not divide a dimension replicates it; vectors replicate.
Optimizer states and the parts of a compressed weight have the weight's path inside theirs, and shard like it.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm import trees
from efflm.model import params

# An axis that is not listed is not split.
WEIGHT_AXES = {"vocabulary": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "width": "fsdp"}


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one leaf. Raises ValueError for a matrix that is no weight."""
    if not shape:
        return PartitionSpec()
    param, _ = params.find(path)
    if param is None and len(shape) > 1:
        raise ValueError(f"{path} of shape {shape} is no weight of a model: add it to efflm/model/params.py")
    if param is None or not param.is_matrix:
        return PartitionSpec(*(None,) * len(shape))  # vectors are small
    names = (None,) * (len(shape) - 2) + param.axes  # stacked layers lead with an axis of their own
    mesh_axes = [WEIGHT_AXES.get(name) for name in names[-len(shape) :]]
    divides = [axis is not None and size % mesh.shape[axis] == 0 for size, axis in zip(shape, mesh_axes, strict=True)]
    return PartitionSpec(*(axis if fits else None for axis, fits in zip(mesh_axes, divides, strict=True)))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of the tree, which may be abstract."""
    return trees.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), tree, inside=True
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """The shapes, dtypes and shardings of the arrays of a tree that is or will be on a mesh, with nothing allocated."""
    lay = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(lay, tree, shardings(tree, mesh))
