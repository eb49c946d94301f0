"""Standard streams that take not everything: one line and exit code 2, not the interpreter's last words."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from efflm.cli.flags import launch
def main():
    print("began", file=sys.stderr)
    print({text!r})
launch(main, "What it does.", ["x", *sys.argv[1:]])
"""


def ended(*flags, text="done", stdout=subprocess.PIPE, **environment):
    command = [sys.executable, "-c", PROGRAM.format(text=text), *flags]
    return subprocess.run(
        command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\xb1 \U0001f600"), ("latin-1", r"± \U0001f600"), ("ascii:replace", "? ?")]
)
def test_what_stdout_has_no_character_for_is_written_as_an_escape(encoding, shown):
    command = [sys.executable, "-c", PROGRAM.format(text="± 😀")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (run.returncode, run.stdout.decode("latin-1").strip()) == (0, shown)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("flags", "before"), [([], "began\n"), (["--help"], "")])
def test_a_full_stdout_is_one_line_that_names_it(flags, before, unbuffered):
    with open("/dev/full", "w") as full:
        run = ended(*flags, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert run.returncode == 2
    assert run.stderr == before + "error: stdout cannot be written (No space left on device): send it elsewhere\n"


def test_a_reader_that_leaves_is_told_but_not_of_a_help_text():
    for flags, code, said in (
        ([], 2, "began\nerror: stdout cannot be written (Broken pipe): send it elsewhere\n"),
        (["--help"], 0, ""),
    ):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as broken:
            run = ended(*flags, stdout=broken)
        assert (run.returncode, run.stderr) == (code, said)


def test_a_closed_stdout_is_no_error():
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(PROGRAM.format(text='done'))} >&-"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "began\n")


def test_a_full_stderr_changes_no_exit_code():
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(text="x"), "--wrong"], cwd=ROOT, stderr=full, timeout=60
        )
    assert run.returncode == 2
