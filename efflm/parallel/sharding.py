"""How batches and activations are sharded over a mesh. Of weights: model.placement."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm.parallel import meshes

BATCH = PartitionSpec(("data", "fsdp"), "sequence")  # of [B, T]

# Axes of activations, where the width is whole and each device has its own sequences.
ACTIVATIONS = {"batch": ("data", "fsdp"), "length": "sequence", None: None} | dict.fromkeys(
    ("heads", "mlp", "vocabulary"), "tensor"
)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """A `with`, or a decorator, in which what is traced knows the mesh: `constrain` and `sequence_shards` read it."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def on_one_device(tree: Any) -> Any:
    """The arrays of the tree on the first device, as those of a mesh of one: `jax.device_put` to a device would leave
    the mesh that they come from in their types, where `mesh_of` reads it."""
    return jax.device_put(tree, NamedSharding(meshes.make_mesh(), PartitionSpec()))


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
