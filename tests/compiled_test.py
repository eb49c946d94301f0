"""What is kept of compiled programs, and what is not."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding, PartitionSpec

from efflm.parallel import meshes
from tests import compiled


@pytest.fixture
def kept(tmp_path):
    """A folder of its own, into which everything goes."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    set_to = lambda folder, seconds: (
        jax.config.update("jax_compilation_cache_dir", folder),
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds),
        reset_cache(),
    )
    set_to(str(tmp_path), 0.0)
    yield tmp_path
    set_to(*before)


def program():
    """A new function each time, so that only what is kept can spare a compilation."""
    return jax.jit(lambda kept_or_not: jnp.sin(kept_or_not) @ kept_or_not.T)


def files(folder):
    return list(Path(folder).glob("jit__lambda*"))


def test_a_program_of_one_device_is_kept_and_a_broken_file_is_written_again(kept):
    x = np.eye(3, dtype=np.float32)
    want = program()(x)
    (file,) = files(kept)
    whole = file.read_bytes()
    np.testing.assert_array_equal(program()(x), want)
    file.write_bytes(whole[:100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        np.testing.assert_array_equal(program()(x), want)
    assert len(file.read_bytes()) > 100
    assert [each for each in files(kept) if each != file] == []


def test_a_program_of_several_devices_is_not_kept_but_compiled_once(kept, monkeypatch):
    x = jax.device_put(np.eye(8, dtype=np.float32), NamedSharding(meshes.make_mesh(data=8), PartitionSpec("data")))
    want, compiling = program()(x), []
    monkeypatch.setattr("jax._src.compiler.backend_compile_and_load", lambda *_: compiling.append(0))
    np.testing.assert_array_equal(program()(x), want)
    assert (files(kept), compiling) == ([], [])


def test_what_was_not_used_for_days_is_removed(tmp_path):
    old, new = tmp_path / "tests-compiled-a" / "old", tmp_path / "tests-compiled-b" / "new"
    for file in (old, new):
        file.parent.mkdir()
        file.touch()
    os.utime(old, (0, time.time() - (compiled.DAYS + 1) * 86400))
    compiled.remove_old(new.parent)
    assert (old.exists(), new.exists()) == (False, True)
