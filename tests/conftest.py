"""Eight devices on the CPU, set before JAX starts; implicit rank promotion is an error.

Tests compile much and compute little. So LLVM's optimizations are left out and, where it still exists, the emitter of
fused loops that compiles faster is chosen, unless EFFLM_TEST_OPTIMIZED is set (XLA's own optimizations, which tests
look at, stay in). The processes of one run share what they have compiled.
"""

# ruff: noqa: E402
import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if not os.environ.get("EFFLM_TEST_OPTIMIZED"):
    flags += ["--xla_backend_optimization_level=0"]
    if version("jaxlib") < "0.11":
        flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # else the first process has set these two
    os.environ["XLA_FLAGS"] = " ".join(flags)
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="efflm-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("efflm", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("efflm")


@pytest.fixture(autouse=True)
def left_to_later_collections():
    """What earlier tests left is not looked through again for garbage: compiled programs are many objects, and the code
    under test that collects took most of its time for that."""
    gc.freeze()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
