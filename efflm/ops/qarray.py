"""QArray: a matrix of small integers with scales.

    w ~ (codes - zeros) * scale

codes are signed integers of 2 to 8 bits, packed along the contracted axis into bytes below 8 (see ops.packing). Each
output channel has one scale, which may be negative, or one for each `group` of entries along the contracted axis; the
last group may be shorter. With super-blocks these are codes too, times one scale of each super-block.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from efflm.config import require
from efflm.ops.format import INT8, Activations, Format
from efflm.ops.grid import Grid, as_stored, by_entry, grid_of, in_super_blocks, own_dtype, symmetric_scale
from efflm.ops.lowrank import LowRank
from efflm.ops.packing import pack, unpack
from efflm.precision import cast


@flax.struct.dataclass
class QArray:
    """A quantized matrix, or a stack of them with leading axes that no field below counts.

    values: int8 codes in the shape of the matrix, or uint8 with the contracted axis packed. scale: floating, the shape
    of the matrix with the contracted axis reduced to the number of groups. zeros: int8 like scale, the code of zero;
    None: 0. activation_scale: float32 [..., 1, 1] with "int8_static". super_scale: with a super_block, floating, the
    axis reduced to the number of super-blocks; scale is then int8 codes of it, and zeros are packed along the axis.
    So read them by `scales` and `zero_points`. axis: the contracted axis, counted from the end. size: its length.
    dtype: of what the matrix stands for. bits, group, super_block, activations, coded: see Format; group is 0 where one
    scale is for the whole axis, and super_block then too.

    An exact zero stays one. Of an element that the codes reach |w - dequantize(w)| <= |scale| / 2. Where a symmetric
    range is not clipped all are reached but those next to the largest magnitude and of the other sign: |scale| there.
    """

    values: jax.Array
    scale: jax.Array
    zeros: jax.Array | None = None
    activation_scale: jax.Array | None = None
    super_scale: jax.Array | None = None
    bits: int = flax.struct.field(pytree_node=False, default=8)
    axis: int = flax.struct.field(pytree_node=False, default=-2)
    group: int = flax.struct.field(pytree_node=False, default=0)
    size: int = flax.struct.field(pytree_node=False, default=0)
    activations: Activations = flax.struct.field(pytree_node=False, default="float")
    dtype: str = flax.struct.field(pytree_node=False, default="float32")
    super_block: int = flax.struct.field(pytree_node=False, default=0)
    coded: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def format(self) -> Format:
        """How it would be rounded again."""
        kept = {name: getattr(self, name) for name in ("bits", "group", "super_block", "activations", "coded")}
        floats = self.super_scale if self.super_block else self.scale
        return Format(**kept, symmetric=self.zeros is None, scale_dtype=str(floats.dtype))


@flax.struct.dataclass
class FakeQuantized:
    """A float matrix, already rounded, whose matmuls round the other operand too. Only for training."""

    value: jax.Array
    activation_scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim


def codes(w: QArray) -> jax.Array:
    """int8 codes in the shape of the matrix."""
    return unpack(w.values, w.bits, w.size, w.axis)


def scales(w: QArray) -> jax.Array:
    """float32 scales of the groups, however they are stored."""
    scale = w.scale.astype(jnp.float32)
    if not w.super_block:
        return scale
    return scale * by_entry(w.super_scale.astype(jnp.float32), w.axis, w.super_block // w.group, scale.shape[w.axis])


def zero_points(w: QArray) -> jax.Array | None:
    """int8 codes of zero of the groups, however they are stored; None: all 0."""
    if w.zeros is None or not w.super_block:
        return w.zeros
    return unpack(w.zeros, w.bits, w.scale.shape[w.axis], w.axis)


def in_full(w: QArray) -> QArray:
    """The same with each scale and zero point stored in full: scales in the dtype of the super-blocks', float16 if that
    can be (see ops.grid.in_super_blocks)."""
    if not w.super_block:
        return w
    dtype = "float16" if w.super_scale.dtype == jnp.float16 else "float32"
    return w.replace(scale=scales(w).astype(dtype), zeros=zero_points(w), super_scale=None, super_block=0)


# --- rounding --------------------------------------------------------------------------------------------------------


def rounded_rows(x: jax.Array, activation_scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rows of x [..., K] as integer matmuls read them: int8 in [-127, 127], and a float32 scale for each row [..., 1].

    The scale is the largest magnitude / 127, or the one given for all rows (int8_static). It is NaN for a row that is
    not finite, so that all that is computed from the row is NaN, and nothing else is.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = symmetric_scale(absmax, 127) if activation_scale is None else activation_scale.reshape((1,) * x.ndim)
    values = jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8)
    return values, jnp.where(jnp.isfinite(absmax), scale, jnp.nan)


def quantize_array(
    w: jax.Array,
    axis: int,
    format: Format = INT8,
    grid: Grid | None = None,
    activation_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
) -> QArray:
    """A float matrix [..., in, out] rounded to the nearest codes of a format. Raises InputError.

    axis: the contracted one. grid: scales and zeros, if they are known; they are rounded to what is stored. importance:
    see `grid_of`. activation_scale: with int8_static. While it is traced, where no dtype can depend on numbers, scales
    of the dtype "" stay float32.
    """
    require(
        (activation_scale is not None) == (format.activations == "int8_static"),
        f"activations is {format.activations!r}: a static scale goes with int8_static, and with that alone",
    )
    axis = axis % w.ndim - w.ndim
    size = w.shape[axis]
    scale, zeros = grid_of(w, axis, format, importance) if grid is None else (as_stored(grid[0], axis, format), grid[1])
    values, floats, codes = _packed(w, scale, zeros, axis, format), scale, None
    if format.super_block_in(size):
        codes, floats = (
            part.astype(dtype) for part, dtype in zip(in_super_blocks(scale, axis, format), ("int8", "float32"))
        )
        zeros = None if zeros is None else pack(zeros, format.bits, axis)
    floats = floats.astype(format.scale_dtype or own_dtype(floats))
    scale, super_scale = (floats, None) if codes is None else (codes, floats)
    static = {"bits": format.bits, "group": format.group_in(size), "activations": format.activations}
    static |= {"super_block": format.super_block_in(size), "axis": axis, "size": size, "dtype": str(w.dtype)}
    static |= {"coded": format.is_coded}
    return QArray(values, scale, zeros, activation_scale, super_scale, **static)


def _round(w: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, format: Format) -> jax.Array:
    """int8 codes, not packed."""
    return _nearest(w, (scale, zeros), axis, format.group_in(w.shape[axis]), format.low).astype(jnp.int8)


def _nearest(w: jax.Array, grid: Grid, axis: int, group: int, low: int | jax.Array) -> jax.Array:
    """The same as whole float32 numbers, from `low` to -low - 1."""
    scale, zeros = grid
    each = lambda per_group: by_entry(per_group.astype(jnp.float32), axis, group, w.shape[axis])
    rounded = jnp.round(w.astype(jnp.float32) / each(scale)) + (0.0 if zeros is None else each(zeros))
    return jnp.clip(rounded, low, -low - 1)


def nearest_on_grid(w: jax.Array, grid: Grid, axis: int, group: int, low: int | jax.Array) -> jax.Array:
    """float32: what `quantize_array` makes of a float matrix with a grid whose codes go from `low` to -low - 1. `low`
    may be traced, so that one program serves all bits."""
    return _floats(_nearest(w, grid, axis, group, low), *grid, axis, group)


def _packed(w: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, format: Format) -> jax.Array:
    """The codes as they are stored, by one program for all formats that round alike."""
    return _rounded_and_packed(w, scale, zeros, axis, Format(bits=format.bits, group=format.group_in(w.shape[axis])))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded_and_packed(
    w: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, format: Format
) -> jax.Array:
    return pack(_round(w, scale, zeros, axis, format), format.bits, axis)


def dequantize(w: Any) -> jax.Array:
    """The float matrix a weight stands for."""
    if isinstance(w, FakeQuantized):
        return w.value
    if isinstance(w, LowRank):
        base = dequantize(w.base)
        correction = jnp.matmul(w.a.astype(jnp.float32), w.b.astype(jnp.float32), precision="highest")
        return (base.astype(jnp.float32) + correction).astype(base.dtype)
    if not isinstance(w, QArray):
        return w
    return _dequantize(w)


def in_dtype(w: Any, dtype: str) -> Any:
    """The weight with its floats in another dtype; a quantized one stands for such floats, and is stored as before."""
    if isinstance(w, LowRank):
        return LowRank(in_dtype(w.base, dtype), *cast((w.a, w.b), dtype))
    return w.replace(dtype=dtype) if isinstance(w, QArray) else cast(w, dtype)


def in_float32(w: Any) -> jax.Array:
    """The same in float32, in which all that chooses or trains weights computes."""
    return dequantize(w).astype(jnp.float32)


@jax.jit
def _dequantize(w: QArray) -> jax.Array:
    return _floats(codes(w), scales(w), zero_points(w), w.axis, w.group).astype(w.dtype)


def _floats(numbers: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, group: int) -> jax.Array:
    """What codes in the shape of the matrix stand for, float32."""
    each = lambda per_group: by_entry(per_group.astype(jnp.float32), axis, group, numbers.shape[axis])
    return (numbers.astype(jnp.float32) - (0.0 if zeros is None else each(zeros))) * each(scale)


def requantize(master: jax.Array, like: Any) -> Any:
    """A float master in the format of the weight `like`, by the codes of the scales and zeros that this one has; of a
    LowRank weight in that of its base, so that it is one."""
    like = like.base if isinstance(like, LowRank) else like
    if not isinstance(like, QArray):
        return master.astype(like.dtype)
    return like.replace(values=_packed(master, scales(like), zero_points(like), like.axis, like.format))


def rounded_anew(w: jax.Array, like: Any) -> Any:
    """A float matrix in the format of the weight `like`, by scales and zeros of its own, whose ranges are searched."""
    if not isinstance(like, QArray):
        return w.astype(like.dtype)
    searched = dataclasses.replace(like.format, clip=True)
    return quantize_array(w.astype(like.dtype), like.axis, searched, activation_scale=like.activation_scale)


def with_gradient_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, computed of x, with a gradient as if it were x: the straight-through estimator (Bengio 2013, arXiv
    1308.3432)."""
    return x + jax.lax.stop_gradient(value - x)


def on_grid(w: jax.Array, axis: int, format: Format, grid: Grid) -> jax.Array:
    """What `quantize_array` makes of a float matrix with this grid, as floats, with the gradients of LSQ (Esser 2020,
    arXiv 1902.08153, equations 1 to 3).

    A weight w of the code q with the scale s and the zero z has the gradient 1, s the gradient (q - z) - w / s. Of one
    that is beyond the codes, by more than the half step that rounding takes, they are 0 and q - z.
    """
    size = w.shape[axis]
    scale, zeros = (
        jnp.float32(0) if part is None else by_entry(part.astype(jnp.float32), axis, format.group_in(size), size)
        for part in grid
    )
    low, high, steps = format.low - zeros, format.high - zeros, w.astype(jnp.float32) / scale
    reached = jnp.clip(steps, low - 0.5, high + 0.5)
    return with_gradient_of(reached, jnp.clip(jnp.round(steps), low, high)) * scale


def straight_through(master: jax.Array, like: Any) -> Any:
    """Forward: what inference with `requantize(master, like)` computes with. Backward: `on_grid`, of floats the
    identity. Where the format rounds activations too, marked so that `dot` does."""
    like = like.base if isinstance(like, LowRank) else like
    if not isinstance(like, QArray):
        return master.astype(like.dtype).astype(master.dtype)
    found = on_grid(master, like.axis, like.format, (scales(like), zero_points(like)))
    value = found.astype(like.dtype).astype(master.dtype)
    return value if like.activations == "float" else FakeQuantized(value, like.activation_scale)


def operands(x: jax.Array, w: Any) -> tuple[jax.Array, jax.Array]:
    """What a float matmul reads to give what `dot` gives: x [..., K], rounded straight-through where w asks for it, in
    its dtype, and w as floats."""
    if isinstance(w, FakeQuantized) or (isinstance(w, QArray) and w.activations != "float"):
        values, scale = rounded_rows(x, w.activation_scale)
        x = with_gradient_of(x, (values.astype(jnp.float32) * scale).astype(x.dtype))
    return x, dequantize(w)


# --- parts of a matrix -----------------------------------------------------------------------------------------------


def rows(table: Any, indices: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D], as floats."""
    if not isinstance(table, QArray) or table.axis != -1:
        return dequantize(table)[indices]
    # All its arrays lead with the rows but the one scale of all activations.
    return dequantize(jax.tree.map(lambda part: part[indices], table.replace(activation_scale=None)))


def take(w: Any, axis: int, indices: jax.Array) -> Any:
    """The slices `indices` of a matrix along an axis, in its format. Along the contracted axis of a matrix with groups
    these are formed anew, so values are rounded again, by ranges that are searched."""
    if isinstance(w, LowRank):
        inputs = axis % w.ndim == 0
        part = {"a": jnp.take(w.a, indices, axis=0)} if inputs else {"b": jnp.take(w.b, indices, axis=1)}
        return w.replace(base=take(w.base, axis, indices), **part)
    if not isinstance(w, QArray):
        return jnp.take(w, indices, axis=axis)
    axis = axis % w.ndim - w.ndim
    if axis == w.axis and w.group:
        return rounded_anew(jnp.take(dequantize(w), indices, axis=axis), w)  # neighbours that were none
    kept = jnp.take(codes(w), indices, axis=axis)
    per_channel = lambda part: part if part is None or axis == w.axis else jnp.take(part, indices, axis=axis)
    parts = {name: per_channel(getattr(w, name)) for name in ("scale", "zeros", "super_scale")}
    return w.replace(values=pack(kept, w.bits, w.axis), size=kept.shape[w.axis], **parts)


def apply_mask(w: Any, mask: jax.Array) -> Any:
    """The weight with exact zeros where the mask is False, in its format."""
    if isinstance(w, LowRank):
        return w.replace(base=apply_mask(w.base, mask))
    if not isinstance(w, QArray):
        return jnp.where(mask, w, jnp.zeros((), w.dtype))
    zeros = zero_points(w)
    zero = jnp.int8(0) if zeros is None else by_entry(zeros, w.axis, w.group, w.size)
    return w.replace(values=pack(jnp.where(mask, codes(w), zero), w.bits, w.axis))
