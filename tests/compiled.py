"""Compiled programs of one device are kept in the user's cache, for the processes of this run and for later runs.

The folder is one for each jaxlib, set of XLA's flags and kind of processor; in it JAX's key is a hash of the program
before XLA, so what a change of the code changes is compiled anew. A program for several devices is not kept, since
XLA's CPU runtime can wait for ever in one that it has read back: the process that compiled it uses it again.
"""

import collections
import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

import jax
import jaxlib
from jax._src import compilation_cache, compiler, lru_cache

from efflm import user_cache

DAYS = 7  # after which what was not used is removed
SECONDS = 0.01  # of compilation, above which a program is kept
SEVERAL = 64  # programs for several devices that a process holds at most


def folder() -> Path:
    """Where this process keeps its programs. Raises InputError where the user's cache is not to be had."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ()
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    kind = repr((jaxlib.__version__, os.environ.get("XLA_FLAGS"), processor))
    return user_cache.folder(f"tests-compiled-{hashlib.sha256(kind.encode()).hexdigest()[:16]}")


def remove_old(kept: Path) -> None:
    """Remove what no run has used for some days, also of other processors and versions."""
    for file in kept.parent.glob("tests-compiled-*/*"):
        with contextlib.suppress(OSError):  # another run removes it as well
            if file.stat().st_mtime < time.time() - DAYS * 86400:
                file.unlink()


class Kept(lru_cache.LRUCache):
    """Files that are there whole or not at all, also where others write; the time of a file is that of its last use."""

    def get(self, key: str) -> bytes | None:
        value = super().get(key)
        if value is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path / f"{key}-cache")
        return value

    def put(self, key: str, value: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=str(self.path), delete=False) as file:
            file.write(value)
        os.replace(file.name, self.path / f"{key}-cache")


def keep(kept: Path) -> None:
    """From now on this process keeps its programs in the folder."""
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    compilation_cache.LRUCache = Kept
    several: collections.OrderedDict = collections.OrderedDict()
    compile_or_read, key_of = compiler.compile_or_get_cached, compiler._get_cache_key

    def key_of_one(options, backend, computation, devices, *rest):
        return key_of(options, backend, computation, devices, *rest) if devices.size == 1 else None

    def compiled(backend, computation, devices, options, host_callbacks, *rest, **named):
        given = (backend, computation, devices, options, host_callbacks)
        if devices.size == 1 or host_callbacks:
            return compile_or_read(*given, *rest, **named)
        key = key_of(options, backend, computation, devices), tuple(device.id for device in devices.flat)
        if key not in several:
            several[key] = compile_or_read(*given, *rest, **named)
        several.move_to_end(key)
        if len(several) > SEVERAL:
            several.popitem(last=False)
        return several[key]

    compiler._get_cache_key, compiler.compile_or_get_cached = key_of_one, compiled
