"""Faults of devices that come again from the same checkpoint: they are not worth another start for ever.

A kernel that reads beyond its arrays and a memory chip that breaks end in the same error. The second passes, once the
scheduler gives another machine or the driver has set the chip aside; the first does not.
"""

import contextlib
import json
from pathlib import Path

from efflm.cli import run_directory
from efflm.parallel import processes

MOST = 3  # from one checkpoint on


def require_passing(file: Path, step: int, error: BaseException) -> None:
    """Count a fault of a run whose newest checkpoint is that of `step` in `file`, which outlives the process.

    Raises RuntimeError, which is final, for the MOST-th without a new checkpoint in between."""
    times = 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(file.read_text())
        times += int(before["times"]) if before["step"] == step else 0
    with contextlib.suppress(OSError):
        run_directory.write_json(file, {"step": step, "times": times, "last": processes.reason(error)})
    if times >= MOST:
        raise RuntimeError(
            f"a device failed {times} times without a checkpoint in between, so starting again does not help: "
            f"{processes.reason(error)}. {file} counts them: remove it to try again"
        ) from error
