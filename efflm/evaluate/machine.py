"""What this machine can do, measured on the spot: the two numbers of its roofline (Williams 2009), and whether other
programs use it meanwhile. Programs that do."""

import contextlib
import dataclasses
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops


@dataclasses.dataclass(frozen=True)
class Roofline:
    """matmul: FLOP/s of a large square matmul in a dtype, by its name; bandwidth: bytes/s read and written."""

    matmul: dict[str, float]
    bandwidth: float

    def seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The least time that work of so many FLOPs and so many bytes can take: the slower of the two decides."""
        return max(flops / self.matmul[dtype], nbytes / self.bandwidth)


def measure(dtypes: tuple[str, ...]) -> Roofline:
    """The best of some runs each, on the default device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    return Roofline({dtype: matmul_peak(dtype, size) for dtype in dtypes}, bandwidth())


def matmul_peak(dtype: Any, size: int, repeats: int = 7) -> float:
    """FLOP/s of [size, size] @ [size, size] with operands of `dtype`, accumulated in float32."""
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _fastest(jax.jit(ops.dot), x, x, repeats=repeats)


@functools.cache
def peak(dtype: str, devices: int) -> float:
    """FLOP/s of this many devices together, measured briefly on one; those of a CPU share its cores."""
    on_cpu = jax.default_backend() == "cpu"
    return matmul_peak(dtype, 1024 if on_cpu else 8192, repeats=3) * (1 if on_cpu else devices)


def bandwidth(repeats: int = 7, nbytes: int = 1 << 29) -> float:
    """Bytes a second of an update in place, which reads and writes an array far larger than the caches."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, times = jnp.zeros(nbytes // 4, jnp.float32), []
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(add_one(x))
        times.append(time.perf_counter() - start)
    return 2 * nbytes / min(times)


def read_bandwidth(repeats: int = 7, nbytes: int = 1 << 29) -> float:
    """Bytes a second read of arrays far larger than the caches, by all cores: what decoding is limited by.

    XLA's CPU compiler multiplies a matrix by a vector in one thread, and reads faster so than in any sum: every core
    has a thread and a matrix of its own, and a second of each lets a free core go on.
    """
    parts, width = 2 * (os.cpu_count() or 1), 8192
    product, x = jax.jit(jnp.matmul), jnp.ones(width, jnp.float32)
    matrices = [jnp.ones((nbytes // 4 // parts // width, width), jnp.float32) for _ in range(parts)]
    with ThreadPoolExecutor(parts) as pool:
        read = lambda: list(pool.map(lambda matrix: jax.block_until_ready(product(matrix, x)), matrices))
        return sum(matrix.nbytes for matrix in matrices) / _fastest(read, repeats=repeats)


QUIET = 0.05  # of the processors that this program may use: what others may take from it


@dataclasses.dataclass(frozen=True)
class Load:
    """Processors that other programs took from this one on average, before speed was measured and meanwhile."""

    before: float
    during: float

    def __str__(self) -> str:
        """A sentence where the machine was not quiet, else nothing."""
        count = _usable()
        if max(self.before, self.during) <= QUIET * count:
            return ""
        return (
            f" The machine was not quiet: other programs used {self.before:.1f} of {count} processors before these "
            f"measurements and {self.during:.1f} meanwhile, so speeds are lower than alone and ratios less exact."
        )


def most(loads: Iterable[Load]) -> Load:
    """The most of several measurements."""
    before, during = zip(*((each.before, each.during) for each in loads), strict=True)
    return Load(max(before), max(during))


def load_watched(seconds: float = 0.5) -> Callable[[], Load]:
    """Look for `seconds` at what other programs use; what is returned tells that, and what they used since."""
    since = _others()
    time.sleep(seconds)
    before, since = since(), _others()
    return lambda: Load(before, since())


def _others() -> Callable[[], float]:
    """A function that tells how many processors, on average since now, others than this process and those that it
    started used and this one could have had. 0 where the system does not tell, as on macOS."""
    began, start, reserved = time.perf_counter(), _used(), (os.cpu_count() or 1) - _usable()
    return lambda: max(0.0, (_used() - start) / max(time.perf_counter() - began, 1e-9) - reserved)


def _used() -> float:
    """Seconds that all processors worked, less those that they worked for this process and those it started."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    ticks = user + nice + system + sum(interrupts)  # the last of these is what a hypervisor gave to others
    worked = ticks / os.sysconf("SC_CLK_TCK")
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return worked - sum(each.ru_utime + each.ru_stime for each in ours)


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(fn: Callable[..., Any], *args: Any, repeats: int) -> float:
    jax.block_until_ready(fn(*args))  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times)


SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100_000):\n        pass"


@contextlib.contextmanager
def rivals(count: int) -> Iterator[Callable[[bool], None]]:
    """`count` processes that each keep a core busy, as long as what this gives was last called with True; at first they
    do not run.

    Each has a session of its own, as the programs of another user have: Linux shares the cores among sessions first.
    """
    processes = []

    def let_run(on: bool) -> None:
        for process in processes:
            process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    try:
        for _ in range(count):
            command = [sys.executable, "-c", SPIN, str(os.getpid())]
            processes.append(subprocess.Popen(command, start_new_session=True))
        let_run(False)
        yield let_run
    finally:
        for process in processes:
            process.kill()
            process.wait()
