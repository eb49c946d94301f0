"""What a process ends with: errors that come again are final, those of machines and networks are not."""

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from efflm.cli import flags
from efflm.config import InputError
from efflm.config.parallel import HostsConfig
from efflm.parallel import processes

ROOT = Path(__file__).parents[2]
BUG, MISTAKE, MEMORY, RETRY = processes.BUG, processes.MISTAKE, processes.MEMORY, processes.RETRY
XLA = jax.errors.JaxRuntimeError
CLOSED = "[external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23952"
CALLBACK = "INTERNAL: CpuCallback error calling callback: Traceback (most recent call last):\n gloo.py\n ABORTED: no"
WRITING = 'Error writing "a0/0" in OCDBT database at local file "/run/x/": Failed to write 270025 bytes to file 4'


def stored(status, number):
    """An error as TensorStore words it."""
    return ValueError(
        f"{status}: {WRITING}: {os.strerror(number)} [os_error_code='{number}'] [tensorstore_spec='{{}}']"
    )


ERRORS = [  # error, its exit code before training began, and after
    (InputError("train.batch is 0"), MISTAKE, MISTAKE),
    (processes.Interrupted("storage failed"), RETRY, RETRY),
    (ZeroDivisionError("division by zero"), BUG, BUG),
    (RuntimeError("ABORTED by hand"), BUG, BUG),
    (KeyError("params"), BUG, BUG),
    (MemoryError(), MEMORY, MEMORY),
    # XLA
    (XLA("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes."), MEMORY, MEMORY),
    (XLA("INTERNAL: Failed to allocate 1 bytes: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), MEMORY, MEMORY),
    (XLA("INVALID_ARGUMENT: Executable expected parameter 0 of size 4 but got buffer of size 8"), BUG, BUG),
    (XLA("INTERNAL: RET_CHECK failure (xla/service/spmd/spmd_partitioner.cc:1) partitioned"), BUG, BUG),
    (XLA(CALLBACK), BUG, BUG),
    (XLA("UNIMPLEMENTED: this"), BUG, BUG),
    # lost processes: the first four were recorded when one of two processes was killed
    (XLA(f"UNKNOWN: Gloo all-reduce failed: {CLOSED}"), RETRY, RETRY),
    (ValueError(f"UNKNOWN: Gloo AllGather failed: {CLOSED}"), RETRY, RETRY),
    (
        XLA("INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout."),
        RETRY,
        RETRY,
    ),
    (TimeoutError("Timed out while waiting for async_write_complete barrier."), MISTAKE, RETRY),
    (XLA("FAILED_PRECONDITION: Error dispatching computation: UNKNOWN: Gloo all-reduce failed: x"), RETRY, RETRY),
    (XLA("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), RETRY, RETRY),
    (XLA("UNAVAILABLE: failed to connect to all addresses"), RETRY, RETRY),
    (XLA("DEADLINE_EXCEEDED: Barrier timed out. Id: x"), RETRY, RETRY),
    (XLA("ABORTED: the coordinator restarted"), RETRY, RETRY),
    (XLA("CANCELLED: CANCELLED"), RETRY, RETRY),
    # accelerators that break, as XLA words it
    *(
        (XLA(text), RETRY, RETRY)
        for text in (
            "INTERNAL: Failed to synchronize: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered",
            "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
            "UNKNOWN: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
            "INTERNAL: CUDA_ERROR_NVLINK_UNCORRECTABLE: uncorrectable NVLink error detected during the execution",
            "INTERNAL: CUDA_ERROR_CONTAINED: Invalid access of peer GPU memory over nvlink or a hardware error",
            "INTERNAL: CUDA_ERROR_HARDWARE_STACK_ERROR: hardware stack error",
            "INTERNAL: stream did not block host until done; was already in an error state",
            "INTERNAL: GPU 3 has fallen off the bus (Xid 79)",
            "INTERNAL: HIP_ERROR_IllegalAddress: an illegal memory access was encountered",
            "INTERNAL: hipErrorECCNotCorrectable: uncorrectable ECC error encountered",
            "INTERNAL: Accelerator device halted prematurely, perhaps due to an on-device check-failure. Node 0 halted",
            "FAILED_PRECONDITION: The program continuator has halted unexpectedly.",
            "UNKNOWN: TPU core halted, ICI link error",
            "DATA_LOSS: 2 root error(s) found: uncorrectable HBM error",
            "DATA_LOSS: TPU memory was corrupted",
            "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
        )
    ),
    (XLA("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm: error while it was allocated"), MEMORY, MEMORY),
    (XLA("INVALID_ARGUMENT: illegal memory access was asked for"), BUG, BUG),
    (XLA("INTERNAL: Mosaic failed to compile TPU kernel: eccentric layout in hbm"), BUG, BUG),
    (XLA("INTERNAL: CpuCallback error: Traceback\nuncorrectable ECC error"), BUG, BUG),
    (ValueError("DATA_LOSS: Error reading local file: checksum differs [tensorstore_spec='{}']"), BUG, BUG),
    (RuntimeError("the ECC of the code is uncorrectable"), BUG, BUG),
    # the operating system, itself or through TensorStore, which makes RESOURCE_EXHAUSTED of a full disk
    *((OSError(n, os.strerror(n)), MISTAKE, MISTAKE) for n in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)),
    *((OSError(n, os.strerror(n)), MISTAKE, RETRY) for n in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN)),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY, MEMORY),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), MISTAKE, MISTAKE),
    (stored("RESOURCE_EXHAUSTED", errno.ENOSPC), MISTAKE, MISTAKE),
    (stored("OUT_OF_RANGE", errno.EFBIG), MISTAKE, MISTAKE),
    (stored("PERMISSION_DENIED", errno.EACCES), MISTAKE, MISTAKE),
    (stored("UNKNOWN", errno.EIO), MISTAKE, RETRY),
    (ValueError("PERMISSION_DENIED: the bucket is not yours"), MISTAKE, MISTAKE),
    (stored("RESOURCE_EXHAUSTED", errno.ENOMEM), MEMORY, MEMORY),
]


@pytest.mark.parametrize(("error", "before", "after"), ERRORS, ids=lambda value: repr(value)[:60])
def test_each_error_has_its_exit_code(error, before, after):
    assert processes.exit_code(error) == before
    assert processes.exit_code(error, began=True) == after
    for code in {before, after} - {BUG}:
        line = processes.explain(error, code)
        assert "\n" not in line
        assert "tensorstore_spec" not in line


def test_what_xla_raises_is_known():
    for raising, code in (
        (lambda: jnp.zeros(1 << 44).block_until_ready(), MEMORY),
        (lambda: jax.jit(lambda x: jax.pure_callback(len, jax.ShapeDtypeStruct((), jnp.int32), x))(1.0), BUG),
    ):
        with pytest.raises(XLA) as caught:
            jax.block_until_ready(raising())
        assert processes.exit_code(caught.value) == code


def test_only_what_is_worth_another_try_is_raised_as_interrupted():
    for error, _, after in ERRORS:
        with pytest.raises(processes.Interrupted if after == RETRY else type(error)) as caught, processes.begun():
            raise error
        assert processes.exit_code(caught.value, began=True) == after
        if after != RETRY:
            assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("steps is 0"), MISTAKE, "error: steps is 0"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), MISTAKE, "error: Read-only file system: /x"),
        (OSError(errno.ENOSPC, "No space left on device"), MISTAKE, "error: No space left on device: free some space"),
        (MemoryError(), MEMORY, "error: out of memory (MemoryError): make the batch"),
        (XLA("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong"), MEMORY, "error: out of memory (RESOURCE"),
        (processes.Interrupted("the disk is gone"), RETRY, "error: the disk is gone"),
        (
            XLA("UNAVAILABLE: no route"),
            RETRY,
            "error: a machine, a device, the network or storage failed (UNAVAILABLE: no route)",
        ),
    ],
    ids=repr,
)
def test_launch_ends_with_it_and_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        flags.launch(main, "", ["x"])
    assert stopped.value.code == code
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "a:1"}, "hosts.index is -1 of hosts.count 0"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "hosts.index is 2"),
        ({"coordinator": "a", "count": 2, "index": 1}, "give an address and a port"),
        ({"heartbeat": 0}, "hosts.heartbeat is 0"),
    ],
)
def test_hosts_that_cannot_be_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        HostsConfig(**values)


@pytest.mark.parametrize(("raised", "code"), [("ZeroDivisionError('x')", BUG), ("MemoryError()", MEMORY)])
def test_a_process_among_others_ends_at_once_and_says_how(raised, code):
    """It joined (here nobody but itself), so Python's own end would say goodbye to the others; no hook is replaced."""
    program = (
        "import sys\nfrom efflm.cli import flags\nfrom efflm.config.parallel import HostsConfig\n"
        "before = sys.excepthook, sys.unraisablehook\n"
        "def main():\n"
        "    assert (sys.excepthook, sys.unraisablehook) == before\n"
        f"    raise {raised}\n"
        "flags.launch(main, '', sys.argv, hosts=HostsConfig())\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        command = [
            sys.executable,
            "-c",
            program,
            f"--hosts.coordinator=localhost:{port}",
            "--hosts.count=1",
            "--hosts.index=0",
        ]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == f"this process ends with exit code {code}"
    assert bool(re.search("Traceback", ended.stderr)) == (code == BUG)
