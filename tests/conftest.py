"""Eight devices on the CPU, set before JAX starts; implicit rank promotion is an error."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: LLVM's optimizations are left out (XLA's own, which tests look at, stay in).
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("efflm", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("efflm")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
