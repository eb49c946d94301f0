"""Several processes that run one program: how they find each other, take turns, and end together.

Each runs the same code on the same numbers; what differs is whose devices hold which part. Process 0 alone prints and
writes what belongs to the run as a whole.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from efflm.config import InputError
from efflm.config.parallel import HostsConfig

# What a process ends with. Only RETRY (sysexits' EX_TEMPFAIL) makes the scripts in launch/ start all of them again.
# INTERRUPTED is what shells give a program that Ctrl-C has ended.
BUG, MISTAKE, MEMORY, RETRY, INTERRUPTED = 1, 2, 3, 75, 130

# Errors of machines, networks and network storage. Any other of the operating system (ENOSPC, EDQUOT, EACCES, EROFS)
# is about the directory that the user gave, and comes again.
_FAILED_IO = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN,
}  # fmt: skip
# XLA's and TensorStore's errors begin with the name of a status of absl; the first line is theirs, others are not.
_STATUS = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|UNAUTHENTICATED"
    "|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS): (.*)"
)
# What lost processes look like under another status: "UNKNOWN: Gloo all-reduce failed: ... Connection reset by peer".
_LOST = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED):|gloo|nccl|connection (reset|closed|refused)|heartbeat timeout"
    "|barrier failed|coordination service",
    re.IGNORECASE,
)
# What accelerators that break look like; XLA's DATA_LOSS, too, is their memory. A kernel of ours that is wrong can look
# the same, so a run is not started again for ever because of it (train.faults).
_FAULT = re.compile(
    r"\becc\b|uncorrectable|parity error|nvlink|\bxid\b|fallen off the bus|(device|gpu) (is|was) lost|halted"
    r"|\bici\b.*(error|fail|down)|hbm\b.*corrupt|hardware (error|fault|failure)|memory access fault"
    r"|illegal memory access|unspecified launch failure|already in an error state"
    r"|(cuda|hip)_?error_?\w*(illegal_?address|illegal_?instruction|hardware|launch_?fail|contained|device_?unavailable|system_?not_?ready|unknown)",
    re.IGNORECASE,
)
_NO_FAULT = {
    "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
}  # fmt: skip


class Interrupted(Exception):
    """What failed was a machine, a device, the network or storage: the run can go on from its last checkpoint.

    The message is one line, for the user; the exit code is RETRY."""


def exit_code(error: BaseException, began: bool = False) -> int:
    """What a process that fails with `error` ends with: MISTAKE, MEMORY and BUG come again if it is started again.

    Input and output that fail are the user's mistake until training began (a path on storage that does not work), and
    worth another try after it. Lost processes are so at any time.
    """
    if isinstance(error, Interrupted):
        return RETRY
    if isinstance(error, InputError):
        return MISTAKE
    text = str(error).partition("\n")[0]
    system = _system_error(error)
    if isinstance(error, MemoryError) or system == errno.ENOMEM:
        return MEMORY
    if isinstance(error, OSError) or system:
        failed = system in _FAILED_IO or (system is None and isinstance(error, TimeoutError | ConnectionError))
        return RETRY if failed and began else MISTAKE
    status = _STATUS.match(text)
    if not status:
        return RETRY if is_fault(error) else BUG
    if status[1] in ("PERMISSION_DENIED", "UNAUTHENTICATED"):  # of remote storage
        return MISTAKE
    if re.search("RESOURCE_EXHAUSTED:|out of memory", text, re.IGNORECASE):
        return MEMORY
    return RETRY if _LOST.search(text) or is_fault(error) else BUG


def is_fault(error: BaseException) -> bool:
    """Whether it is, or came of, an accelerator that broke: of its memory, its links, or the whole device."""
    if isinstance(error, Interrupted) and error.__cause__:
        error = error.__cause__
    text, of_xla = str(error).partition("\n")[0], isinstance(error, jax.errors.JaxRuntimeError)
    status = _STATUS.match(text)
    if not (status or of_xla) or (status and status[1] in _NO_FAULT):
        return False
    return bool(_FAULT.search(text)) or bool(of_xla and status and status[1] == "DATA_LOSS")


def reason(error: BaseException) -> str:
    """What went wrong, in one line: of the system's errors the system's words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    system = _system_error(error)  # TensorStore has them after a long list of paths
    return os.strerror(system) if system else str(error).partition("\n")[0] or type(error).__name__


def explain(error: BaseException, code: int) -> str:
    """The line that tells the user of an error that is no BUG, and what to do."""
    if isinstance(error, InputError | Interrupted):
        return str(error)
    if code == MEMORY:
        return f"out of memory ({reason(error)}): make the batch, the sequences or the model smaller, or add devices"
    if code == RETRY:
        what = "a machine, a device, the network or storage failed"
        return f"{what} ({reason(error)}): start again, from the last checkpoint"
    named = getattr(error, "filename", None)
    return reason(error) if named else f"{reason(error)}: free some space, or write to another folder"


@contextlib.contextmanager
def begun() -> Iterator[None]:
    """What goes on in here is a run that began to train: raises Interrupted for what is worth another try."""
    try:
        yield
    except Exception as error:
        if exit_code(error, began=True) == RETRY:
            raise Interrupted(explain(error, RETRY)) from error
        raise


def _system_error(error: BaseException) -> int | None:
    """The errno of an error of the operating system, which TensorStore has in its text; None if it is no such."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\[os_error_code='(\d+)'", str(error)) if _STATUS.match(str(error)) else None
    return int(found[1]) if found else None


def start(hosts: HostsConfig) -> None:
    """Join the other processes, if there are any, before the first use of a device. Raises InputError.

    From here on a process that fails must `leave`: it would wait for the others to say goodbye, and they for it.
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
        if exit_code(error) == RETRY:
            raise
        raise InputError(
            f"cannot join the processes of hosts.coordinator={hosts.coordinator} ({reason(error)}): start all of them "
            "with one of the scripts in launch/"
        ) from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def is_first() -> bool:
    """Whether this process is the one that prints and writes for all."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(code: int, several: bool = False) -> None:
    """End this process; if others wait for it, then without a goodbye.

    Where there are `several` it says so: the first to end is the cause, and the scripts in launch/ look for the line
    (srun and gcloud give the code of one process, not always of that one)."""
    if several:
        print(f"this process ends with exit code {code}", file=sys.stderr)
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
