"""Ctrl-C outside of training: one line, and exit code 130."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STOPPED = "stopped by Ctrl-C: what was written until now stays\n"


IN_PYTHON = """
def main():
    print("began", flush=True)
    time.sleep(600)
"""
IN_C = """
def main():
    library = ctypes.CDLL(None)
    library.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock = ctypes.c_void_p(library.PyThread_allocate_lock())
    threading.Timer(0.5, lambda: print("began", flush=True)).start()
    library.PyThread_acquire_lock(lock, 1)
    library.PyThread_acquire_lock(lock, 1)  # never returns
"""


def started(main):
    program = f"import ctypes, threading, time\nfrom efflm.cli.flags import launch\n{main}\nlaunch(main, '', ['x'])"
    run = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "began\n"
    return run


def test_ctrl_c_is_one_line():
    run = started(IN_PYTHON)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, STOPPED)


def test_a_second_one_does_not_wait_for_python():
    """Which handles no signal while it is in a library, such as XLA when it compiles."""
    run = started(IN_C)
    run.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=1)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, "")


def test_a_process_in_the_background_of_a_script_leaves_ctrl_c_to_the_script():
    program = (
        "import os, signal\nfrom efflm.cli.flags import launch\n"
        "launch(lambda: os.kill(os.getpid(), signal.SIGINT), '', ['x'])\n"
    )
    script = f"trap '' INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    run = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_ctrl_c_while_a_command_is_imported_is_one_line():
    run = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "experiments.pretrain"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for line in run.stderr:
        if line.endswith(" numpy\n"):  # jax and all that comes after it are still to be imported
            run.send_signal(signal.SIGINT)
            break
    rest = run.stderr.read()
    assert run.wait(timeout=60) == 130
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == ["stopped by Ctrl-C"]
