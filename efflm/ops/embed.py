"""Looking rows up in an embedding of any format, and its use as the output layer."""

from typing import Any

import jax

from efflm.ops.dot import dot_transposed
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.qarray import rows


def embed(table: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Rows of table [V, D] for integer tokens [...] -> [..., D] in `dtype`."""
    if isinstance(table, cpu.Panels):
        return cpu.rows(table, tokens).astype(dtype)
    return rows(table.value if isinstance(table, cpu.Dense) else table, tokens).astype(dtype)


def unembed(x: jax.Array, table: Any) -> jax.Array:
    """x [..., D] times every row of table [V, D] -> float32 [..., V]."""
    return dot_transposed(x, table)
