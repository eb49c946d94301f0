"""Meshes of devices: which axes there are, and how many devices along each share a batch."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from efflm.config import require
from efflm.config.parallel import MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")  # the axis that communicates most is innermost, among nearest neighbours


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
