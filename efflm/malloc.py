"""Memory of this process."""

import contextlib
import ctypes
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Numbers of malloc.h. Blocks of at least the first are given back to the system as soon as they are freed, and the end
# of the heap as soon as it has as much free as the second. glibc begins with 128 KiB for both and lets them grow to 32
# and 64 MiB with the blocks that a program frees, until one of them is set: then it changes neither again.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
LEAST, GROWN = 1 << 20, {"mmap_threshold": 32 << 20, "trim_threshold": 64 << 20}


def resident() -> int | None:
    """Bytes of physical memory that this process has; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def trim() -> None:
    """Give what was freed back to the system, where the C library can: it keeps some of it for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def older_left() -> Iterator[None]:
    """While it lasts, collections look only at objects that are made meanwhile. Compiled programs and text are many:
    a collection of all objects takes tenths of a second, and seconds in a long-running program."""
    gc.collect()
    left = gc.get_freeze_count() > 0  # what was frozen before stays frozen
    gc.freeze()
    try:
        yield
    finally:
        if not left:
            gc.unfreeze()


@contextlib.contextmanager
def least() -> Iterator[None]:
    """While it lasts, what is freed is kept for later only in small blocks, and older objects are left alone. After it,
    as much is kept as the environment asks for (GLIBC_TUNABLES, as launch/setup.sh sets it), or else as glibc keeps in
    a program that has run for a while."""
    _set(MMAP_THRESHOLD, LEAST)
    try:
        with older_left():
            yield
    finally:
        trim()
        for number, name in ((MMAP_THRESHOLD, "mmap_threshold"), (TRIM_THRESHOLD, "trim_threshold")):
            _set(number, _asked(name) or GROWN[name])


def _asked(name: str) -> int:
    """What the environment sets a threshold of malloc to, in bytes; 0 if it does not."""
    found = re.search(rf"(?:^|:)glibc\.malloc\.{name}=(\w+)", os.environ.get("GLIBC_TUNABLES", ""))
    with contextlib.suppress(ValueError):
        return int(found[1], 0) if found else int(os.environ.get(f"MALLOC_{name.upper()}_", "0"), 0)
    return 0


def _set(number: int, size: int) -> None:
    """mallopt takes an int, of which glibc makes a size without a sign: -1 is more than any block."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(number, size if size < 1 << 31 else -1)
