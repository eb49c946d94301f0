"""A run has its directory for itself, and says what it needs of the disk."""

import contextlib
import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efflm.cli import run_directory
from efflm.config import InputError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from efflm.cli import run_directory
with run_directory.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"held\n"
    yield run
    run.kill()
    run.wait()


def test_a_second_run_is_told_who_has_the_directory_until_that_one_dies(tmp_path, holder):
    folder = tmp_path / "run"
    with pytest.raises(InputError) as error, run_directory.held(folder):
        pass
    said = str(error.value)
    assert f"process {holder.pid} on {os.uname().nodename}" in said
    assert str(folder) in said
    assert "--run_dir" in said
    assert "\n" not in said
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / run_directory.LOCK).exists()  # what a killed process leaves must not keep the next one out
    with run_directory.held(folder):
        pass


def test_a_process_does_not_lock_itself_out_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "run"
    with run_directory.held(folder):
        with run_directory.held(folder), run_directory.held(tmp_path / "a" / ".." / "a" / "run"):
            assert (folder / run_directory.LOCK).exists()
        with (folder / run_directory.LOCK).open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the inner ones have not released it
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), run_directory.held(folder):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with run_directory.held(folder):
        (folder / "result").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_lock_file_that_was_just_deleted_is_no_lock(tmp_path, monkeypatch):
    """Its last owner deleted it between our opening and our locking it: a third run would lock a new one."""
    locked = []

    def flock(handle, how):
        if not locked:
            (tmp_path / run_directory.LOCK).unlink()
        locked.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_directory.held(tmp_path):
        assert len(locked) == 2
        assert (tmp_path / run_directory.LOCK).stat().st_ino == locked[1]


def test_the_commit_is_that_of_a_repository_that_holds_the_code(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
    run = lambda *args: subprocess.run([*git, *args], check=True, capture_output=True, text=True).stdout.strip()
    inside = tmp_path / "venv" / "efflm"
    inside.mkdir(parents=True)
    (inside / "run_directory.py").touch()
    monkeypatch.setattr(run_directory, "__file__", str(inside / "run_directory.py"))
    assert run_directory._commit() == "unknown"
    run("init", "-q")
    (tmp_path / "other.txt").touch()
    run("add", "other.txt")
    run("commit", "-qm", "of another project")
    assert run_directory._commit() == "unknown"
    run("add", ".")
    run("commit", "-qm", "with the code")
    assert run_directory._commit() == run("rev-parse", "--short", "HEAD")
    (inside / "run_directory.py").write_text("changed")
    assert run_directory._commit().endswith(", changed")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_directory.held(tmp_path / "run"):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "No locks available" in line
    monkeypatch.setattr(run_directory, "fcntl", None)  # a system that has none
    with run_directory.held(tmp_path / "run"):
        pass
    assert capsys.readouterr().err == ""


def test_json_has_null_for_what_is_not_finite(tmp_path):
    given = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": np.float64("nan"), "d": "NaN", "e": True}
    run_directory.write_json(tmp_path / "x.json", given)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None, {"b": None}]], "c": None, "d": "NaN", "e": True}


def test_two_may_write_at_once_and_what_a_killed_one_left_goes_after_an_hour(tmp_path):
    file, hour = tmp_path / "a[1].txt", time.time() - 3700
    old, new = tmp_path / ".a[1].txt.1.partial", tmp_path / ".a[1].txt.2.partial"
    old.mkdir()
    new.write_text("under way")
    os.utime(old, (hour, hour))
    with run_directory.whole(file) as mine, run_directory.whole(file) as theirs:
        mine.write_text("mine")
        theirs.write_text("theirs")
        assert sorted(tmp_path.iterdir()) == sorted([mine, theirs, new])
    assert file.read_text() == "mine"
    with contextlib.suppress(ZeroDivisionError), run_directory.whole(file) as mine:
        mine.mkdir()
        (mine / "part").write_text(str(1 / 0))
    assert file.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([file, new])
