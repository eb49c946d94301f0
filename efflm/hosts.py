"""Several processes that run one program: how they find each other, take turns, and end together.

Each runs the same code on the same numbers; what differs is whose devices hold which part. Process 0 alone prints and
writes what belongs to the run as a whole.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from efflm.config import HostsConfig, InputError

# What a process ends with that lost the others, sysexits' "try again": launch/ starts all anew after it.
LOST = 75


def start(hosts: HostsConfig) -> None:
    """Join the other processes, if there are any, before the first use of a device. Raises InputError.

    From here on a process that fails ends at once: it would wait for the others to say goodbye, and they for it.
    """
    if not hosts.coordinator:
        return
    auto = hosts.coordinator == "auto"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            None if auto else hosts.coordinator,
            None if auto else hosts.count,
            None if auto else hosts.index,
            cluster_detection_method=None if auto else "deactivate",
            heartbeat_timeout_seconds=hosts.heartbeat,
            shutdown_timeout_seconds=2 * hosts.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot join the processes of hosts.coordinator={hosts.coordinator} ({reason}): start all of them with "
            "one of the scripts in launch/"
        ) from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    show = sys.excepthook

    def show_and_leave(*error):
        show(*error)
        leave(1)

    sys.excepthook = show_and_leave


def is_first() -> bool:
    """Whether this process is the one that prints and writes for all."""
    return jax.process_index() == 0


def lost(error: Exception) -> bool:
    """Whether an error is what a process sees of another one's death, or of a broken network."""
    return jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)


def leave(code: int) -> None:
    """End this process. If others wait for it, then without a goodbye."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 does what follows before the others do, who then find it done where they share a disk with it."""
    if not is_first():
        agree(0)
    yield
    if is_first():
        agree(0)


def agree(value: int) -> int:
    """Process 0's value, on all: what they look up on disk they must not see differently."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
