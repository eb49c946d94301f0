"""How a tree of weights is sharded over a mesh: leaf path -> named axes (model.params) -> mesh axes.

A matrix that is no weight is an error. An axis that does not divide a dimension replicates it; vectors replicate.
Optimizer states and the parts of a compressed weight have the weight's path inside theirs, and shard like it.
"""

import contextlib
import contextvars
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efflm import trees
from efflm.config import MeshConfig, require
from efflm.model import params

AXES = ("data", "fsdp", "sequence", "tensor")  # the axis that communicates most is innermost, among nearest neighbours
BATCH = PartitionSpec(("data", "fsdp"), "sequence")  # of [B, T]

# Axes of weights (model.params) in the first table, those of activations in the second, where the width is whole and
# each device has its own sequences. An axis that is not listed is not split.
WEIGHT_AXES = {"vocabulary": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "width": "fsdp"}
ACTIVATIONS = {"batch": ("data", "fsdp"), "length": "sequence", None: None} | dict.fromkeys(
    ("heads", "mlp", "vocabulary"), "tensor"
)


def make_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of the first data * fsdp * sequence * tensor devices, its axes left to XLA's partitioner."""
    shape = (data, fsdp, sequence, tensor)
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()[: math.prod(shape)]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_parallel(batch: int, accumulate: int = 1) -> Mesh:
    """As many of the devices as divide each of the `accumulate` parts of a batch, along `data`."""
    return make_mesh(data=math.gcd(batch // accumulate, jax.device_count()))


def mesh_for(config: MeshConfig, batch: int, length: int, accumulate: int = 1) -> Mesh:
    """The mesh of the config on all devices there are, for sequences [batch, length] that are read in `accumulate`
    parts. Raises InputError. Says on stderr if data=-1 leaves devices without work."""
    sizes, count = dataclasses.asdict(config), jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1)
    require(fixed <= count, f"{asked} asks for {fixed} devices, but there are {count}: lower one of them")
    require(
        count % fixed == 0 or -1 not in sizes.values(),
        f"{asked}: {count} devices are not divisible by {fixed}: change one of them",
    )
    for name, size in sizes.items():
        if size == -1:
            left = count // fixed
            shared = math.gcd(batch // accumulate // config.fsdp, left)
            sizes[name] = shared if name == "data" and jax.process_count() == 1 else left
    require_shares(batch, accumulate, sizes)
    require(
        sizes["sequence"] == 1 or length % (2 * sizes["sequence"]) == 0,
        f"rows of {length} tokens are not divisible by twice mesh.sequence {sizes['sequence']}: change one of them",
    )
    used = math.prod(sizes.values())
    if used < count and config.data == -1 and jax.process_index() == 0:
        print(
            f"note: {count - used} of {count} devices have no work: {_in_parts(batch, accumulate)} cannot be shared by "
            "more; a batch that is a multiple of the devices can",
            file=sys.stderr,
        )
    require(
        used == count or jax.process_count() == 1,
        f"{asked or 'the mesh'} uses {used} of {count} devices, but every process must have a part: set one axis to -1",
    )
    return make_mesh(**sizes)


def require_shares(batch: int, accumulate: int, sizes: Mapping[str, int]) -> None:
    """Raise InputError unless the devices along data and fsdp can share the rows of each part of a batch: else XLA
    gives all rows to every device, and each computes what all could share."""
    parts = batch // accumulate
    require(
        batch % accumulate == 0 and parts % (sizes["data"] * sizes["fsdp"]) == 0,
        f"{_in_parts(batch, accumulate)} cannot be shared by mesh.data {sizes['data']} x mesh.fsdp {sizes['fsdp']} "
        "devices: change one of them",
    )


def _in_parts(batch: int, accumulate: int) -> str:
    return f"a batch of {batch} rows" + (f" in {accumulate} parts (accumulate)" if accumulate > 1 else "")


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


def on_mesh(mesh: Mesh):
    """A `with` in which what is traced knows the mesh: `constrain` and `sequence_shards` read it."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def on_one_device(tree: Any) -> Any:
    """The arrays of the tree on the first device, as those of a mesh of one: `jax.device_put` to a device would leave
    the mesh that they come from in their types, where `mesh_of` reads it."""
    return jax.device_put(tree, NamedSharding(make_mesh(), PartitionSpec()))


@contextlib.contextmanager
def mesh_of(tree: Any) -> Iterator[NamedSharding | None]:
    """`on_mesh` of the mesh of the arrays in the tree; traced arrays know theirs too. One device: no mesh.

    Gives where the sequences [B, ...] of a batch go (traced: on the abstract mesh), or None.
    """
    leaf = jax.tree.leaves(tree)[0]
    mesh = jax.typeof(leaf).sharding.mesh
    if mesh.empty or mesh.size == 1:
        yield None
        return
    with jax.sharding.use_abstract_mesh(mesh):
        devices = mesh if isinstance(leaf, jax.core.Tracer) else leaf.sharding.mesh
        yield NamedSharding(devices, PartitionSpec(BATCH[0]))


_UNCONSTRAINED = contextvars.ContextVar("unconstrained", default=False)


@contextlib.contextmanager
def unconstrained() -> Iterator[None]:
    """A `with` in which `constrain` leaves the layout of activations to the partitioner; the mesh stays known.

    For decoding: with one token a sequence, activations should travel between devices and weights should not.
    """
    token = _UNCONSTRAINED.set(True)
    try:
        yield
    finally:
        _UNCONSTRAINED.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, an activation, sharded over the mesh as ACTIVATIONS says of its axes. Outside of `on_mesh` and inside
    `unconstrained`, x as it is.

    Without it the partitioner is free to follow the weights, and under fsdp splits the width in place of the sequences.
    """
    if is_whole() or _UNCONSTRAINED.get():
        return x
    mesh = jax.sharding.get_abstract_mesh()

    def one(size: int, name: str | None):
        names = ACTIVATIONS[name]
        names = tuple(n for n in (names if isinstance(names, tuple) else (names,)) if n and n not in mesh.manual_axes)
        return names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None

    return lax.with_sharding_constraint(x, PartitionSpec(*map(one, x.shape, axes)))


def is_whole() -> bool:
    """Whether each array lies on one device, as far as what is being traced knows."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def sequence_shards() -> int:
    """Over how many devices each sequence is split, as far as what is being traced knows: the size of `sequence`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["sequence"]
