"""How a tree of weights lies on a mesh: leaf path -> logical axes -> mesh axes.

The first rule that matches a path wins; a leaf that no rule matches is an error. A mesh axis that does not divide a
dimension replicates it. Optimizer states hold their weights' paths inside their own and shard like them; a compressed
weight's arrays follow its path and rank, so an axis reduced to 1 replicates.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efflm import trees

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

RULES = (
    (r"(^|/)embedding(/|$)", ("vocabulary", "width")),
    (r"position_embedding(/|$)", (None, "width")),
    (r"unembedding(/|$)", ("width", "vocabulary")),
    (r"(query|key|value)/kernel(/|$)", ("width", "heads")),
    (r"attention/output/kernel(/|$)", ("heads", "width")),
    (r"(gate|up)/kernel(/|$)", ("width", "hidden")),
    (r"down/kernel(/|$)", ("hidden", "width")),
    (r"(scale|bias)$", (None,)),
)
LOGICAL = {"vocabulary": "tensor", "heads": "tensor", "hidden": "tensor", "width": "fsdp", None: None}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices, its axes left to XLA's partitioner."""
    devices = np.asarray(jax.devices() if devices is None else devices)[: data * fsdp * tensor]
    return Mesh(devices.reshape(data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_parallel(batch: int) -> Mesh:
    """As many of the devices as divide the batch, along `data`."""
    return make_mesh(data=math.gcd(batch, jax.device_count()))


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one leaf. Raises ValueError for a leaf that has dimensions but no rule."""
    if not shape:
        return PartitionSpec()
    logical = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if logical is None:
        raise ValueError(f"no sharding rule matches {path} of shape {shape}: add one to efflm/model/sharding.py")
    logical = (None,) * (len(shape) - len(logical)) + logical  # stacked layers lead with an axis of their own
    axes = []
    for size, name in zip(shape, logical[-len(shape) :], strict=True):
        axis = LOGICAL[name]
        axes.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of the tree, which may be abstract."""
    return trees.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), tree, inside=True
    )
