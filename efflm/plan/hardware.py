"""Accelerators by name, with the peaks their vendors publish. Nothing here was measured; no program reaches all of it.

    h100, h200     SXM: NVIDIA's data sheets (nvidia.com/en-us/data-center/h100 and /h200): 1,979 TFLOP/s in bfloat16
                   and 3,958 TOP/s in int8 with structured sparsity, half of each without; 80 and 141 GB; 3.35 and 4.8
                   TB/s; NVLink 900 GB/s in both directions together, so 450 in. A node holds 8; between nodes each GPU
                   of a DGX has one 400 Gbit/s port (DGX H100 user guide, "network"), 50 GB/s in.
    v5e, v6e       cloud.google.com/tpu/docs/v5e and /v6e: 197 and 918 TFLOP/s, 393 and 1,836 TOP/s, 16 and 32 GB, 819
                   and 1,600 GB/s, a 2D torus with 1,600 and 3,200 Gbit/s a chip in one direction over its four links.
    v5p            cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2,765 GB/s, a 3D torus with 1,200 GB/s a chip in
                   both directions together over its six links. int8: 918 TOP/s, from "How to Scale Your Model"
                   (jax-ml.github.io/scaling-book/tpus), whose table the figures above agree with to a few percent.

A torus is taken to be closed: slices too small to wrap around (an axis of a v5e or v6e below 16, of a v5p below 4)
have less.
"""

import dataclasses
import math
import os
from typing import Any

from efflm.config import InputError, require


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One accelerator.

    bfloat16, int8: dense FLOP/s. memory: bytes of HBM. bandwidth: its bytes/s. link: bytes/s that it can receive from
    its neighbours over all its fast links, one direction. node: devices the fast links join (0: all of them), and
    network: bytes/s received from beyond. torus: dimensions over which the links are spread, 0 where a switch joins.
    """

    name: str
    bfloat16: float
    int8: float
    memory: float
    bandwidth: float
    link: float
    node: int = 0
    network: float = 0.0
    torus: int = 0

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls with operands of this dtype; float32 counts as half of bfloat16's, which flatters it."""
        return {"int8": self.int8, "float32": self.bfloat16 / 2}.get(dtype, self.bfloat16)

    def received_a_second(self, group: tuple[int, ...], devices: int) -> float:
        """Bytes a second that each device of a group can receive while its devices communicate.

        Beyond a node it is the network that bounds. In a torus a group has the links along the dimensions it spans: of
        D * log(group) / log(devices) dimensions out of D, which is exact where the torus is a cube and the group a
        line, a plane or the whole.
        """
        if self.node and len({device // self.node for device in group}) > 1:
            return self.network
        if self.torus and 1 < len(group) < devices:
            return self.link * math.log(len(group)) / math.log(devices)
        return self.link


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware("h100", 989.5e12, 1979e12, 80e9, 3.35e12, 450e9, node=8, network=50e9),
    "h200": Hardware("h200", 989.5e12, 1979e12, 141e9, 4.8e12, 450e9, node=8, network=50e9),
    "v5e": Hardware("v5e", 197e12, 393e12, 16e9, 819e9, 200e9, torus=2),
    "v5p": Hardware("v5p", 459e12, 918e12, 95 * 2**30, 2765e9, 600e9, torus=3),
    "v6e": Hardware("v6e", 918e12, 1836e12, 32e9, 1600e9, 400e9, torus=2),
}


def parse(text: str) -> tuple[Hardware, str]:
    """ "v5p:4x4x4" -> the v5p and "4x4x4"; "h100" -> the H100 and "". Raises InputError."""
    name, _, topology = text.partition(":")
    if name not in HARDWARE:
        raise InputError(f"no hardware is named {name!r}: choose one of {', '.join(HARDWARE)}")
    hardware = HARDWARE[name]
    if topology or text.endswith(":"):
        require(
            hardware.torus > 0, f"hardware is {text!r}, but {name} has no topology: give {name} and the mesh's size"
        )
        sides = topology.split("x")
        require(
            len(sides) == hardware.torus and all(side.isdigit() and int(side) > 0 for side in sides),
            f"hardware is {text!r}, but {name} is a torus of {hardware.torus} dimensions: give its sides as in "
            f"{name}:{'x'.join(['4'] * hardware.torus)}",
        )
    return hardware, topology


def chips(topology: str) -> int:
    """How many devices a topology has."""
    return math.prod(int(side) for side in topology.split("x"))


def tpu_devices(chip: Hardware, topology: str) -> list[Any]:
    """Devices of a TPU that is not attached, to compile for: libtpu must be installed."""
    # libtpu would ask Google what machine this is, complain when no answer comes, and reserve the TPU
    # that is not there for itself alone.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{chip.name}-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{topology}").devices)
