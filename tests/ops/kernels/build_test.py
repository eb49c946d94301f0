"""Building the native kernels: what can go wrong leaves one line and the portable form, and nothing half-written."""

import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efflm.config import InputError
from efflm.ops.kernels.cpu import build

ROOT = Path(__file__).parents[3]
QUICK = 'extern "C" {' + "".join(f"void {name}() {{}}\n" for name in build.HANDLERS) + "}\n"  # in place of the kernels
COMPILER = next(filter(None, map(shutil.which, build.COMPILERS)), None)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("no C++ compiler, or not Linux")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "kernels.cc").write_text(QUICK)
    monkeypatch.setattr(build, "SOURCES", sources)
    return tmp_path / "home"


def cached(home):
    folder = home / ".cache" / "efflm" / "kernels"
    return sorted(folder.iterdir()) if folder.exists() else []


def compiler(monkeypatch, tmp_path, script):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(build, "COMPILERS", (str(path),))


def test_a_library_is_built_once(home, capsys):
    build._loaded("portable")
    (library,) = cached(home)
    made = library.stat().st_mtime_ns
    build._loaded("portable")
    assert cached(home) == [library]
    assert library.stat().st_mtime_ns == made
    assert capsys.readouterr().err == "CPU kernels: compiling (once, some seconds)\n"
    (build.SOURCES / "kernels.cc").write_text(QUICK + "// another version\n")
    build._loaded("portable")
    assert len(cached(home)) == 2


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b"x" + b[100:]]
)
def test_a_damaged_library_is_built_again(home, damage):
    build._loaded("portable")
    (library,) = cached(home)
    whole = library.read_bytes()
    library.unlink()  # it is mapped into this process
    library.write_bytes(damage(whole))
    getattr(build._loaded("portable"), build.HANDLERS[0])
    assert library.read_bytes() == whole
    assert cached(home) == [library]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo note >&2; echo 'k.cc:1: error: a' >&2; exit 1", "they could not be built (k.cc:1: error: a)"),
        ("echo 'ld: no space' >&2; exit 1", "they could not be built (ld: no space)"),
        (
            'test "$1" = --version || { for last; do :; done; echo half > "$last"; exit 1; }',
            "they could not be built (the compiler failed)",
        ),
        ("exit 3", "they could not be built (the compiler failed)"),
        ("kill -9 $$", "they could not be built (the compiler failed)"),
        ("exit 0", "they could not be built ("),  # and writes nothing
    ],
)  # fmt: skip
def test_a_compiler_that_fails_leaves_a_line_and_no_file(home, monkeypatch, tmp_path, capsys, script, said):
    compiler(monkeypatch, tmp_path, script)
    assert build._problem("portable").startswith(said)
    assert cached(home) == []
    capsys.readouterr()
    ready = functools.cache(build.ready.__wrapped__)
    assert not ready("portable")
    assert not ready("portable")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compiling" not in line]
    assert line.startswith(f"CPU kernels: {said}")
    assert line.endswith("; the slower portable forms are used")


def test_a_compiler_that_hangs_is_ended_with_what_it_started(home, monkeypatch, tmp_path):
    compiler(monkeypatch, tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(build, "SECONDS", 0.3)
    assert build._problem("portable") == "building them took more than 0.3 s"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_compiler_and_a_missing_symbol_are_said(monkeypatch):
    (build.SOURCES / "kernels.cc").write_text("int nothing;")
    assert "undefined symbol: efflm" in build._problem("portable")
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert build._problem("portable") == "they could not be built (no C++ compiler was found: install g++)"
    monkeypatch.setattr(build, "supported", lambda: ("portable",))
    assert build._problem("avx2") == "this processor cannot run the form avx2"


@pytest.mark.parametrize("kind", ["a file in its way", "no home"])
def test_without_a_cache_the_library_is_built_for_this_process_alone(home, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    if kind == "no home":
        monkeypatch.setattr(build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        home.write_text("a file")
    getattr(build._loaded("portable"), build.HANDLERS[0])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_read_only_cache_that_has_the_library_is_used(home, monkeypatch, capsys):
    build._loaded("portable")
    monkeypatch.setattr(build.os, "access", lambda path, mode: mode != os.W_OK)
    build._loaded("portable")
    assert capsys.readouterr().err.count("compiling") == 1


def test_two_that_build_at_once_both_succeed(home, monkeypatch, tmp_path):
    """Each waits in its compiler until the other is there too."""
    compiler(
        monkeypatch,
        tmp_path,
        f'case "$1" in --version) exec {COMPILER} "$@";; esac\n'
        f"touch {tmp_path}/began.$$; while [ $(ls {tmp_path}/began.* | wc -l) -lt 2 ]; do sleep 0.01; done\n"
        f'exec {COMPILER} "$@"',
    )
    problems = []
    builders = [threading.Thread(target=lambda: problems.append(build._loaded("portable"))) for _ in range(2)]
    for each in builders:
        each.start()
    for each in builders:
        each.join(60)
    assert len(problems) == 2
    assert len(cached(home)) == 1


def test_what_is_chosen():
    with build.chosen("off"):
        assert build.form() == ""
    with pytest.raises(
        InputError, match=r"kernels is 'sse9', which this processor cannot run: choose one of auto, .*off"
    ):
        build.choose("sse9")
    with pytest.raises(InputError), build.chosen("sse9"):
        pass
    assert build._chosen == ["auto"]


def test_without_a_compiler_a_program_says_so_once_and_computes_the_same():
    program = (
        "import jax.numpy as jnp, numpy as np\n"
        "from efflm import ops\n"
        "w = jnp.arange(12.0).reshape(3, 4)\n"
        "tree = {'w': w, 'q': ops.quantize_array(w, -2)}\n"
        "for _ in range(2):\n"
        "    assert ops.prepare(tree, 'cpu') is tree\n"
        "print(ops.dot(jnp.ones((1, 3)), ops.prepare(tree, 'cpu')['w']))"
    )
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": os.environ["HOME"], "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[[12. 15. 18. 21.]]\n")
    assert done.stderr == (
        "CPU kernels: they could not be built (no C++ compiler was found: install g++); the slower portable forms are "
        "used\n"
    )
