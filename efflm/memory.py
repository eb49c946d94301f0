"""Memory of this process."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

# A number of malloc.h: blocks of at least so many bytes are given back to the system as soon as they are freed. glibc
# begins with 128 KiB and lets it grow to 32 MiB, so that a program that takes such a block often does so faster.
MMAP_THRESHOLD, LEAST, MOST = -3, 1 << 20, 32 << 20


def trim() -> None:
    """Give what was freed back to the system, where the C library can: it keeps some of it for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def least() -> Iterator[None]:
    """While it lasts, what is freed is kept for later only in small blocks."""
    _set_threshold(LEAST)
    try:
        yield
    finally:
        _set_threshold(MOST)
        trim()


def _set_threshold(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, size)
