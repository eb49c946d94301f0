"""The devices and the processes that share a run."""

import dataclasses

from efflm.config import flag, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are laid out; one axis may be -1: the devices that are left"""

    data: int = flag(-1, "copies of the model, each with its own sequences; -1 takes no more than divide the batch")
    fsdp: int = flag(
        1, "devices that keep a part of the weights, gradients and moments each, and have their own sequences"
    )
    sequence: int = flag(1, "devices that read a part of each sequence each")
    tensor: int = flag(1, "devices that compute a part of every matmul each")

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size > 0 or size == -1, f"mesh.{name} is {size}, but must be positive, or -1 for what is left")
        left = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        require(len(left) < 2, f"{' and '.join(left)} are -1, but only one axis can take the devices that are left")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Several processes that run one program together; the scripts in launch/ set these"""

    coordinator: str = flag(
        "",
        "address:port of process 0; auto: as Slurm, a TPU pod or Open MPI say it; empty: this process is alone",
        internal=True,
    )
    count: int = flag(0, "how many processes there are; not with auto", internal=True)
    index: int = flag(-1, "which of them this one is, from 0; not with auto", internal=True)
    heartbeat: int = flag(
        100, "seconds of silence after which a process is given up and the others stop", internal=True
    )
    stopped: int = flag(
        0, "exit code of a run that SIGTERM stopped; 75 tells the scripts of a cluster to start again", internal=True
    )

    def __post_init__(self):
        require(self.heartbeat > 0, f"hosts.heartbeat is {self.heartbeat}, but must be positive")
        if self.coordinator not in ("", "auto"):
            require(
                0 <= self.index < self.count,
                f"hosts.index is {self.index} of hosts.count {self.count}, but must lie in 0 to count - 1",
            )
            require(
                self.coordinator.rpartition(":")[2].isdigit(),
                f"hosts.coordinator is {self.coordinator!r}: give an address and a port, as in 10.0.0.1:1234",
            )
