import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efflm import memory

STATUS = Path("/proc/self/status")
BLOCK = 2 << 20
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell what a process holds")


def in_a_fresh_process(name: str) -> None:
    """Where nothing else takes and frees memory."""
    program = f"from tests import memory_test; memory_test.{name}()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent, timeout=120)


def held() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())[1])


def blocks() -> list[np.ndarray]:
    return [np.ones(BLOCK, np.uint8) for _ in range(32)]


def test_what_is_freed_is_given_back_at_once_while_it_lasts():
    in_a_fresh_process("given_back_at_once")


def given_back_at_once():
    with memory.least():
        pass  # the threshold is then high, as that of a long-running program
    with memory.least():
        before, made = held(), blocks()
        last = made[-1]  # above all others in a heap, which would keep them
        assert held() - before > 30 * BLOCK
        del made
        assert held() - before < 3 * BLOCK
    del last


def test_trimming_gives_back_what_was_kept():
    in_a_fresh_process("trimmed")


def trimmed():
    with memory.least():
        pass
    before, made = held(), blocks()
    last = made[-1]
    del made
    memory.trim()
    assert held() - before < 3 * BLOCK
    del last
