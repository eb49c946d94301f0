"""What this machine can do, measured on the spot: the two numbers of its roofline (Williams 2009)."""

import dataclasses
import os
import time
from collections.abc import Callable
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


def measure(dtypes: tuple[str, ...] = ("float32", "bfloat16"), size: int = 0, repeats: int = 7) -> Roofline:
    """The best of `repeats` runs each, on the default device; `size` is the side of the squares."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    return Roofline({dtype: matmul_peak(dtype, size, repeats) for dtype in dtypes}, bandwidth(repeats))


def matmul_peak(dtype: Any, size: int, repeats: int = 7) -> float:
    """FLOP/s of [size, size] @ [size, size] with operands of `dtype`, accumulated in float32."""
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _fastest(jax.jit(ops.dot), x, x, repeats=repeats)


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


def _fastest(fn: Callable[..., Any], *args: Any, repeats: int) -> float:
    jax.block_until_ready(fn(*args))  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times)
