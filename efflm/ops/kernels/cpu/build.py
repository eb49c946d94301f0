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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

SOURCES = Path(__file__).parent / "src"
HANDLERS = ("efflm_dot", "efflm_attention", "efflm_attention_backward")
# form -> (options of the compiler, what the processor must have, as Linux names it)
FORMS = {
    "avx512": (
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"),
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma"},
    ),
    "avx2": (("-mavx2", "-mfma"), {"avx2", "fma"}),
    "portable": ((), set()),
}
CHOICES = ("auto", *FORMS, "off")
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
SECONDS = 120  # after which a build counts as failed

_chosen = ["auto"]


def choose(form: str) -> None:
    """Which form this process uses from now on: one of CHOICES; "off" is the portable XLA forms alone."""
    _chosen[-1] = form


@contextlib.contextmanager
def chosen(form: str) -> Iterator[None]:
    """`choose` for a `with`. What was compiled by jax.jit before keeps its form."""
    _chosen.append(form)
    try:
        yield
    finally:
        _chosen.pop()


@functools.cache
def supported() -> tuple[str, ...]:
    """The forms that this processor can run, the best first."""
    return tuple(form for form, (_, needs) in FORMS.items() if needs <= _processor())


@functools.cache
def _processor() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


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
        library = ctypes.CDLL(str(_built(form)))
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or ["the compiler failed"]
        return f"they could not be built ({said[0].strip():.200})"
    except subprocess.TimeoutExpired:
        return f"building them took more than {SECONDS} s"
    except OSError as error:
        return f"they could not be built ({error})"
    for name in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target(name, form), capsule, platform="cpu")
    return ""


def target(name: str, form: str) -> str:
    """The name by which XLA knows a kernel in a form."""
    return f"{name}_{form}"


def _built(form: str) -> Path:
    """The shared library of a form, compiled if it is not there. Raises OSError, subprocess.SubprocessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError("no C++ compiler was found: install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    options = (*OPTIONS, *FORMS[form][0])
    said = [jaxlib.__version__, version, *options] + [path.read_text() for path in sorted(SOURCES.iterdir())]
    digest = hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]
    folder = _folder()
    library = folder / f"{form}-{digest}.so"
    if library.exists():
        return library
    print("CPU kernels: compiling (once, some seconds)", file=sys.stderr, flush=True)
    partial = folder / f"{form}-{digest}.{os.getpid()}.tmp"
    command = [compiler, *options, "-isystem", jax.ffi.include_dir(), str(SOURCES / "kernels.cc"), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        partial.rename(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or a fresh private folder where that cannot be written."""
    try:
        folder = Path.home() / ".cache" / "efflm" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or a read-only one
        pass
    return Path(tempfile.mkdtemp(prefix="efflm-kernels-"))
