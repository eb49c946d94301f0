import ctypes
import gc
import os
import re
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from efflm import malloc

STATUS = Path("/proc/self/status")
BLOCK = 2 << 20
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell what a process holds")


def in_a_fresh_process(name: str, **environment: str) -> None:
    """Where nothing else takes and frees memory."""
    program = f"from tests import malloc_test; malloc_test.{name}()"
    root, asked = Path(__file__).parent.parent, os.environ | {"GLIBC_TUNABLES": ""} | environment
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=120, env=asked)


def held() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())[1])


def blocks() -> list[np.ndarray]:
    return [np.ones(BLOCK, np.uint8) for _ in range(32)]


def test_what_is_freed_is_given_back_at_once_while_it_lasts():
    in_a_fresh_process("given_back_at_once")


def given_back_at_once():
    with malloc.least():
        pass  # the threshold is then high, as that of a long-running program
    with malloc.least():
        before, made = held(), blocks()
        last = made[-1]  # above all others in a heap, which would keep them
        assert held() - before > 30 * BLOCK
        del made
        assert held() - before < 3 * BLOCK
    del last


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen before"])
def test_collections_leave_older_objects_alone_while_it_lasts(frozen):
    gc.unfreeze()
    if frozen:
        gc.freeze()
    older = len(gc.get_objects())
    with malloc.least():
        assert len(gc.get_objects()) < older / 2 + 1000  # which are not frozen
        found = weakref.ref(Node())
        assert found() is not None
        malloc.trim()
        assert found() is None
    assert (gc.get_freeze_count() > 0) == frozen
    gc.freeze()  # as tests have it


class Node:
    """Garbage that only a collection finds."""

    def __init__(self):
        self.itself = self


def test_trimming_gives_back_what_was_kept():
    in_a_fresh_process("trimmed")


def trimmed():
    with malloc.least():
        pass
    before, made = held(), blocks()
    last = made[-1]
    del made
    malloc.trim()
    assert held() - before < 3 * BLOCK
    del last


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, 30 << 20),
        ({"MALLOC_MMAP_THRESHOLD_": "200000000", "MALLOC_TRIM_THRESHOLD_": "400000000"}, 100 << 20),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"},
            2100 << 20,
        ),
    ],
)
def test_what_the_environment_asks_for_holds_again_afterwards(asked, size):
    in_a_fresh_process("reused", SIZE=str(size), **asked)


def reused():
    """A block of this size, freed and taken again, is the same memory: nothing is mapped and cleared anew."""
    libc, size = ctypes.CDLL(None), int(os.environ["SIZE"])
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def faults_of_a_block() -> int:
        before, block = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, libc.malloc(size)
        for page in range(0, size, 1 << 16):
            ctypes.memset(block + page, 1, 1)
        libc.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with malloc.least():
        assert min(faults_of_a_block() for _ in range(2)) >= size >> 17  # given back: mapped anew
    faults_of_a_block()
    assert faults_of_a_block() < size >> 20
