"""Eight devices on the CPU, set before JAX starts; implicit rank promotion is an error.

Tests compile much and compute little. So LLVM's optimizations are left out, a program is one part for LLVM and not one
for each thread, which takes a third less, and, where it still exists, the emitter of fused loops that compiles faster
is chosen, unless EFFLM_TEST_OPTIMIZED is set (XLA's own optimizations, which tests look at, stay in). What is compiled
is kept for later runs (tests/compiled.py); what programs that tests start compile, for this run.
"""

# ruff: noqa: E402
import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# A shell that starts this in the background has it ignore Ctrl-C, and tests of that would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if not os.environ.get("EFFLM_TEST_OPTIMIZED"):
    flags += ["--xla_backend_optimization_level=0"]
    if version("jaxlib") < "0.11":
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # else the first process has set these two
    os.environ["XLA_FLAGS"] = " ".join(flags)
    for_this_run = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="efflm-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, for_this_run, ignore_errors=True)

import hypothesis
import jax
import numpy as np
import pytest

from efflm.config import InputError
from efflm.data import dataset
from efflm.ops.kernels.cpu import build
from tests import compiled

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # what a program says of its source is read nowhere
gc.set_threshold(100_000, 50, 1000)  # tracing makes many objects that live: to look for garbage took 1/15 of the time
hypothesis.settings.register_profile("efflm", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("efflm")
try:
    kept = compiled.folder()
except InputError:  # then for the processes of this run
    kept = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled.remove_old(kept)
compiled.keep(kept)


@pytest.fixture(autouse=True)
def left_to_later_collections():
    """What earlier tests left is not looked through again for garbage: compiled programs are many objects, and the code
    under test that collects took most of its time for that."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def programs_leave_room():
    """A process may map 65,530 pieces of memory on most systems, and a compiled program needs several: XLA ends in a
    segmentation fault when it is refused one."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def corpora_of_the_tests(tmp_path_factory):
    """What the experiments prepare of text is not left in the user's cache."""
    prepared = tmp_path_factory.mktemp("corpora")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dataset, "cache", lambda: prepared)
        yield


@pytest.fixture(scope="session")
def native_kernels():
    """Every form of the native kernels that this processor runs, built. With a compiler at hand a build that fails is a
    failure of each test that needs it: the portable forms would pass in its place."""
    if sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler, or not Linux")
    for form in build.supported():
        assert build.ready(form), f"the kernels cannot be built in the form {form}"


@pytest.fixture
def rng():
    return np.random.default_rng(0)
