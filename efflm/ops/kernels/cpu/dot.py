"""Matmuls with weights laid out for the native kernels: the layouts, and the calls.

Dense weights are used as they are. Of quantized ones 32 outputs lie side by side: a panel holds for every 4 inputs (8
bits) or 8 inputs (4 bits) one word of 4 bytes for each output (see src/dot.h). Codes of 3 bits are laid out as 4.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efflm.ops.kernels.cpu import build
from efflm.ops.qarray import QArray, codes

PANEL, UNIT = 32, 8
MOST_INPUTS = 65_000  # beyond which sums of products of 8-bit codes may not fit into 32 bits
# Rows from which on XLA's matmul with a dense weight is the faster one, by dtype of the weight.
FEW_ROWS = {"float32": 4, "bfloat16": 16}


@flax.struct.dataclass
class Panels:
    """A quantized matrix in panels. Only for computing on this machine: made by ops.prepare, never saved.

    values: uint8 [panels, steps, 32, 4]; scale: float32 [groups, 32 * panels]; zeros: int8 like scale, or None. The
    other fields are the QArray's; `outputs` is the size of the axis that is not contracted.
    """

    values: jax.Array
    scale: jax.Array
    zeros: jax.Array | None = None
    activation_scale: jax.Array | None = None
    bits: int = flax.struct.field(pytree_node=False, default=8)
    axis: int = flax.struct.field(pytree_node=False, default=-2)
    group: int = flax.struct.field(pytree_node=False, default=0)
    size: int = flax.struct.field(pytree_node=False, default=0)
    outputs: int = flax.struct.field(pytree_node=False, default=0)
    activations: str = flax.struct.field(pytree_node=False, default="float")
    dtype: str = flax.struct.field(pytree_node=False, default="float32")
    form: str = flax.struct.field(pytree_node=False, default="")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.outputs, self.size) if self.axis == -1 else (self.size, self.outputs)

    @property
    def ndim(self) -> int:
        return 2


@flax.struct.dataclass
class Dense:
    """A float matrix whose products with few rows a native kernel computes. Made by ops.prepare, never saved."""

    value: jax.Array
    form: str = flax.struct.field(pytree_node=False, default="")

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return 2


def takes(w: QArray) -> bool:
    """Whether a quantized matrix can be laid out in panels."""
    return w.ndim == 2 and w.size <= MOST_INPUTS and w.group % UNIT == 0


def panels(w: QArray, form: str) -> Panels:
    """A quantized matrix laid out in panels, by numpy on the host."""
    by_output = (lambda x: np.asarray(x)) if w.axis == -1 else (lambda x: np.asarray(x).T)
    held = 8 if w.bits == 8 else 4
    numbers = by_output(codes(w))
    outputs, size = numbers.shape
    fill = lambda x, inputs: np.pad(x, ((0, -outputs % PANEL), (0, inputs)))
    biased = (fill(numbers, -size % UNIT).astype(np.int16) + 2 ** (held - 1)).astype(np.uint8)
    if held == 4:
        halves = biased.reshape(len(biased), -1, 2, 4)
        biased = halves[:, :, 0] | halves[:, :, 1] << 4
    words = biased.reshape(len(biased) // PANEL, PANEL, -1, 4).swapaxes(1, 2)
    of_groups = lambda x, dtype: jnp.asarray(fill(by_output(x), 0).T.astype(dtype))
    return Panels(
        jnp.asarray(np.ascontiguousarray(words)),
        of_groups(w.scale, np.float32),
        None if w.zeros is None else of_groups(w.zeros, np.int8),
        w.activation_scale,
        bits=held,
        axis=w.axis,
        group=w.group,
        size=size,
        outputs=outputs,
        activations=w.activations,
        dtype=str(w.scale.dtype),
        form=form,
    )


def rows(table: Panels, indices: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D] in panels, as floats in the dtype of its scales."""
    words = table.values[indices // PANEL, :, indices % PANEL].astype(jnp.int16)
    if table.bits == 4:
        words = jnp.stack([words & 15, words >> 4], axis=-2)
    numbers = words.reshape(*indices.shape, -1)[..., : table.size] - 2 ** (table.bits - 1)
    spread = lambda part: jnp.repeat(part.T[indices], table.group or table.size, axis=-1)[..., : table.size]
    centered = numbers.astype(jnp.float32)
    if table.zeros is not None:
        centered = centered - spread(table.zeros).astype(jnp.float32)
    return (centered * spread(table.scale)).astype(table.dtype)


def _call(form: str, x, values, scale, zeros, x_scale, outputs: int, **attributes: Any) -> jax.Array:
    none = lambda part, dtype: jnp.zeros(0, dtype) if part is None else part
    return jax.ffi.ffi_call(
        build.target("efflm_dot", form),
        jax.ShapeDtypeStruct((*x.shape[:-1], outputs), jnp.float32),
        vmap_method="sequential",
    )(
        x, values, none(scale, jnp.float32), none(zeros, jnp.int8), none(x_scale, jnp.float32),
        **attributes,
    )  # fmt: skip


def dot(x: jax.Array, w: Panels) -> jax.Array:
    """x [..., K], float32 or bfloat16, times a matrix in panels -> float32 [..., N]."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        x = x.astype(jnp.float32)
    scale = w.activation_scale if w.activations == "int8_static" else None
    return _call(
        w.form, x, w.values, w.scale, w.zeros, scale, w.outputs,
        format=np.int32(2 if w.bits == 8 else 3), transposed=False,
        round_x=w.activations != "float", group=np.int64(w.group),
    )  # fmt: skip


def dense(x: jax.Array, w: Dense, transposed: bool) -> jax.Array | None:
    """x [..., K], float32 or bfloat16, times a dense matrix -> float32 [..., N]; None where XLA's matmul is faster.

    bfloat16 rows times a float32 matrix would be rounded differently from XLA's, and are left to it.
    """
    count = int(np.prod(x.shape[:-1]))
    few = count <= FEW_ROWS.get(str(w.value.dtype), 0)
    if not few or x.dtype not in (jnp.float32, jnp.bfloat16) or (x.dtype, w.value.dtype) == (jnp.bfloat16, jnp.float32):
        return None
    return _call(
        w.form, x, w.value, None, None, None, w.shape[0 if transposed else 1],
        format=np.int32(0 if w.value.dtype == jnp.float32 else 1), transposed=transposed,
        round_x=False, group=np.int64(0),
    )  # fmt: skip
