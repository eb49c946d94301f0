"""Compiling the native kernels with this machine's C++ compiler, once for each version, and loading them.

A form is what the kernels are compiled for: "avx512" (AVX-512 with VNNI), "avx2", or "portable" C++. The best that the
processor has is built on first use and kept in a folder of the user's; two processes that build at once both succeed.
Without a compiler, or where a build fails, one line on stderr says so and the portable XLA forms run in their place.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

from efflm import user_cache
from efflm.cli import run_directory
from efflm.config import InputError, require
from efflm.config.machine import Kernels

SOURCES = Path(__file__).parent / "src"
HANDLERS = ("efflm_dots", "efflm_feedforward", "efflm_decode", "efflm_attention", "efflm_attention_backward")
# form -> (options of the compiler, what the processor must have, as Linux names it)
FORMS = {
    "avx512": (
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c"},
    ),
    "avx2": (("-mavx2", "-mfma", "-mf16c"), {"avx2", "fma", "f16c"}),
    "portable": ((), set()),
}
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
SECONDS = 120  # after which a build counts as failed

_chosen = ["auto"]


def choose(form: Kernels) -> None:
    """Which form this process uses from now on; "off": the portable XLA forms alone. Raises InputError."""
    can = ("auto", *supported(), "off")
    require(form in can, f"kernels is {form!r}, which this processor cannot run: choose one of {', '.join(can)}")
    _chosen[-1] = form


@contextlib.contextmanager
def chosen(form: Kernels) -> Iterator[None]:
    """`choose` for a `with`. What was compiled by jax.jit before keeps its form."""
    _chosen.append(_chosen[-1])
    try:
        choose(form)
        yield
    finally:
        _chosen.pop()


@functools.cache
def supported() -> tuple[str, ...]:
    """The forms that this processor can run, the best first."""
    return tuple(form for form, (_, needs) in FORMS.items() if needs <= run_directory.processor()[1])


def form() -> str:
    """The form to use, built and loaded; "" where the native kernels are off or cannot be had."""
    wanted = supported()[0] if _chosen[-1] == "auto" else _chosen[-1]
    return "" if wanted == "off" or not ready(wanted) else wanted


@functools.cache
def ready(form: str) -> bool:
    """Whether the kernels of a form are registered with XLA; the first call builds them."""
    problem = _problem(form)
    if problem:
        print(f"CPU kernels: {problem}; the slower portable forms are used", file=sys.stderr)
    return not problem


def _problem(form: str) -> str:
    if sys.platform != "linux":
        return f"they are built on Linux only, and this is {platform.system()}"
    if form not in supported():
        return f"this processor cannot run the form {form}"
    try:
        library = _loaded(form)
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in HANDLERS}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        said = next((line for line in lines if "error" in line), (lines or ["the compiler failed"])[0])
        return f"they could not be built ({said.strip():.200})"
    except subprocess.TimeoutExpired:
        return f"building them took more than {SECONDS} s"
    except (OSError, AttributeError) as error:  # the latter: a symbol is missing
        return f"they could not be built ({error})"
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(target(name, form), handler, platform="cpu")
    return ""


def target(name: str, form: str) -> str:
    """The name by which XLA knows a kernel in a form."""
    return f"{name}_{form}"


def _loaded(form: str) -> ctypes.CDLL:
    """The shared library of a form, compiled if it is not there. Raises OSError, subprocess.SubprocessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError("no C++ compiler was found: install g++")
    options = (*OPTIONS, *FORMS[form][0])
    said = [jaxlib.__version__, _output([compiler, "--version"]), *options]
    said += [path.read_text() for path in sorted(SOURCES.iterdir())]
    name = f"{form}-{hashlib.sha256(chr(0).join(said).encode()).hexdigest()[:16]}.so"
    with _folder(name) as folder:
        library = folder / name
        if not _is_whole(library):
            print("CPU kernels: compiling (once, some seconds)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as scratch:
                partial = Path(scratch, name)
                headers = ["-isystem", jax.ffi.include_dir()]
                _output([compiler, *options, *headers, str(SOURCES / "kernels.cc"), "-o", str(partial)])
                content = partial.read_bytes()
                partial.write_bytes(content + hashlib.sha256(content).digest())  # what follows the sections is not read
                partial.chmod(0o700)
                partial.rename(library)
        return ctypes.CDLL(str(library))


def _output(command: list[str]) -> str:
    """What a command prints. One that fails, or takes too long, raises; nothing that it started goes on."""
    piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **piped, text=True, errors="replace", process_group=0) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _is_whole(library: Path) -> bool:
    """Whether a library is there, the user's alone to write, and ends in its own digest: loading a damaged one may end
    the process."""
    try:
        with library.open("rb") as file:
            content, own = file.read(), user_cache.is_own(os.fstat(file.fileno()))
    except OSError:
        return False
    return own and hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def _folder(name: str) -> Iterator[Path]:
    """Where the library `name` is or can be kept: the user's cache, or, where that is not to be had or not to be
    trusted, which is said, a private folder that is removed at the end."""
    try:
        folder = user_cache.folder("kernels")
        kept = os.access(folder, os.W_OK) or _is_whole(folder / name)
    except InputError as error:
        print(f"CPU kernels: built for this process alone: {error}", file=sys.stderr)
        kept = False
    if kept:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="efflm-kernels-") as private:
            yield Path(private)
