"""What other programs use of the machine while speed is measured is told beside the figures."""

import os
import subprocess
import sys
import time

import pytest

from efflm.evaluate import machine
from efflm.evaluate.machine import Load

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell what is used")


def work(seconds):
    """Of this process: seconds of its processor time."""
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_a_quiet_machine_is_not_mentioned():
    assert str(Load(0.0, 0.05)) == ""


def test_other_programs_are_told_with_their_share(monkeypatch):
    monkeypatch.setattr(machine, "_usable", lambda: 2)
    assert "other programs used 0.0 of 2 processors before these measurements and 0.9 meanwhile" in str(Load(0.0, 0.9))
    assert "used 0.3 of 2 processors before" in str(Load(0.3, 0.0))


def test_what_this_process_and_those_it_started_do_is_not_counted():
    used = machine._used()
    work(0.3)
    ours = machine._used()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(1.0)
    theirs = machine._used()
    busy.kill()
    busy.wait()
    # The counters have steps of 10 ms, and other programs may run too, so only the large difference is certain.
    assert theirs - ours > 0.3
    assert machine._used() - theirs < 0.3  # once it has ended, what a child used is this process's own
    assert used <= ours + 0.05


def test_processors_that_this_process_may_not_use_are_theirs(monkeypatch):
    monkeypatch.setattr(machine, "_usable", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    seconds = iter([0.0, 30.0, 0.0, 63.0])
    clock = iter([0.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(machine, "_used", lambda: next(seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert machine._others()() == 0.0  # 34 are free
    assert machine._others()() == 1.0  # one of the two is not
