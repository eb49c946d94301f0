"""QArray: a matrix of small integers with scales.

    w ~ (codes - zeros) * scale

codes are signed integers of 8, 4, 3 or 2 bits. Below 8 they are packed along the contracted axis into bytes, the first
code in the lowest bits: two or four in a byte, or eight in three bytes. Each output channel has one scale, which may be
negative, or one for each `group` of entries along the contracted axis; the last group may be shorter.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm.config import require
from efflm.ops.format import INT8, Activations, Format
from efflm.ops.lowrank import LowRank
from efflm.ops.packing import pack, unpack
from efflm.precision import cast

RATIOS = np.linspace(0.4, 1.15, 16, dtype=np.float32)  # of the range of a group, tried as its range
SHIFTS = (-1.0, 0.0, 1.0)  # of the zero point, tried with each
LEAST_FLOAT16, MOST_FLOAT16 = 2.0**-17, 65504.0  # between them a float16 has at least the 8 bits of a bfloat16
Grid = tuple[jax.Array, jax.Array | None]  # scales float32, zeros int8; see as_stored


@flax.struct.dataclass
class QArray:
    """A quantized matrix, or a stack of them with leading axes that no field below counts.

    values: int8 codes in the shape of the matrix, or uint8 with the contracted axis packed. scale: floating, the shape
    of the matrix with the contracted axis reduced to the number of groups; read it by `scales`. zeros: int8 like scale,
    the code of zero; None: 0. activation_scale: float32 [..., 1, 1] with "int8_static". axis: the contracted axis,
    counted from the end. size: its length. dtype: of what the matrix stands for. bits, group, activations: see Format;
    group is 0 where one scale is for the whole axis.

    An exact zero stays one. Of an element that the codes reach |w - dequantize(w)| <= |scale| / 2. Where a symmetric
    range is not clipped all are reached but those next to the largest magnitude and of the other sign: |scale| there.
    """

    values: jax.Array
    scale: jax.Array
    zeros: jax.Array | None = None
    activation_scale: jax.Array | None = None
    bits: int = flax.struct.field(pytree_node=False, default=8)
    axis: int = flax.struct.field(pytree_node=False, default=-2)
    group: int = flax.struct.field(pytree_node=False, default=0)
    size: int = flax.struct.field(pytree_node=False, default=0)
    activations: Activations = flax.struct.field(pytree_node=False, default="float")
    dtype: str = flax.struct.field(pytree_node=False, default="float32")

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
        kept = {name: getattr(self, name) for name in ("bits", "group", "activations")}
        return Format(**kept, symmetric=self.zeros is None, scale_dtype=str(self.scale.dtype))


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
    return w.scale.astype(jnp.float32)


# --- rounding --------------------------------------------------------------------------------------------------------


def grouped(x: jax.Array, axis: int, group: int) -> jax.Array:
    """x with `axis` split into (groups, entries), the last group filled up with zeros; group 0: a single one."""
    axis = axis % x.ndim
    size = x.shape[axis]
    group = min(group or size, size)
    padded = jnp.pad(x, [(0, -size % group) if i == axis else (0, 0) for i in range(x.ndim)])
    return padded.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])


def by_entry(per_group: jax.Array, axis: int, group: int, size: int) -> jax.Array:
    """One value for each entry of an axis of `size`, from one for each group; broadcast where there is one group."""
    if per_group.shape[axis] == 1:
        return per_group
    return lax.slice_in_dim(jnp.repeat(per_group, group, axis=axis), 0, size, axis=axis % per_group.ndim)


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


def symmetric_scale(absmax: jax.Array, most: int) -> jax.Array:
    """The scale with which the largest magnitude is the code `most`; 1 where all is zero."""
    return jnp.where(absmax > 0, absmax / most, 1.0)


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
    scale, zeros = grid_of(w, axis, format, importance) if grid is None else (as_stored(grid[0], format), grid[1])
    values = _packed(w, scale, zeros, axis, format)
    static = {"bits": format.bits, "group": format.group_in(size), "activations": format.activations}
    scale = scale.astype(format.scale_dtype or _own_dtype(scale))
    return QArray(values, scale, zeros, activation_scale, axis=axis, size=size, dtype=str(w.dtype), **static)


@functools.partial(jax.jit, static_argnums=1)
def as_stored(scale: jax.Array, format: Format) -> jax.Array:
    """float32 scales rounded to the format's dtype of scales. None becomes 0 or infinite.

    "": to float16, where each keeps at least 8 significant bits in it: those between 2^-17 (a weight of 1e-6 in 4 bits)
    and 65504; otherwise all to bfloat16, whose range is that of float32.
    """
    if not format.scale_dtype:
        return jnp.where(_in_float16(scale), _rounded_to(scale, "float16"), _rounded_to(scale, "bfloat16"))
    return _rounded_to(scale, format.scale_dtype)


def _rounded_to(scale: jax.Array, dtype: str) -> jax.Array:
    limits = jnp.finfo(dtype)
    least = limits.smallest_subnormal if dtype == "float16" else limits.tiny  # others are flushed to 0
    within = jnp.clip(jnp.abs(scale), float(least), float(limits.max)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale < 0, -within, within)


def _in_float16(scale: jax.Array) -> jax.Array:
    magnitude = jnp.abs(scale)
    return jnp.all((magnitude >= LEAST_FLOAT16) & (magnitude <= MOST_FLOAT16))


def _own_dtype(scale: jax.Array) -> str:
    """The dtype of scales that `as_stored` rounded to one of its own choice."""
    if isinstance(scale, jax.core.Tracer):
        return "float32"
    return "float16" if _in_float16(scale) else "bfloat16"


@functools.partial(jax.jit, static_argnums=(1, 2))
def grid_of(w: jax.Array, axis: int, format: Format, importance: jax.Array | None = None) -> Grid:
    """The scales and zeros of the groups of a float matrix, each with `axis` reduced to groups (see Format).

    The scales are as they are stored, in float32. Where the format clips, a range of each group is searched for the
    least squared error weighted by `importance`, float32 [size of axis], of each input the sum of its squares (the
    diagonal of X^T X). Without it the weight is the magnitude plus the root mean square of the group, as in llama.cpp's
    K-quants: on stories15M in 4, 3 and 2 bits better than squared magnitudes, than none and than no search. Tried are
    parts of the range, both signs of a symmetric grid, and shifted zero points, each with the scale that is best for
    the codes it gives (least squares).
    The whole range stays where none has a smaller error.
    """
    group, steps = format.group_in(w.shape[axis]), 2**format.bits - 1
    split = grouped(w.astype(jnp.float32), axis, group)  # the entries of a group now lie along `axis`
    bottom, top = jnp.minimum(jnp.min(split, axis), 0.0), jnp.maximum(jnp.max(split, axis), 0.0)
    if format.scales == "matrix":
        bottom, top = jnp.full_like(bottom, jnp.min(bottom)), jnp.full_like(top, jnp.max(top))
    if format.symmetric:
        unit = jnp.where(top > -bottom, top, bottom) / format.low
        zeros = jnp.zeros_like(unit)
    else:
        unit = (top - bottom) / steps
        zeros = jnp.clip(jnp.round(-bottom / jnp.where(unit == 0, 1.0, unit)) + format.low, format.low, format.high)
    unit = as_stored(jnp.where(unit == 0, 1.0, unit), format)
    stored_zeros = lambda zeros: None if format.symmetric else zeros.astype(jnp.int8)
    if not format.clip:
        return unit, stored_zeros(zeros)

    # From here on in units of `unit`: as numbers of steps.
    spread = lambda per_group: jnp.expand_dims(per_group, axis)
    split = split / spread(unit)
    if importance is None:
        weight = jnp.abs(split) + jnp.sqrt(jnp.mean(jnp.square(split), axis=axis, keepdims=True))
    else:
        along = importance.astype(jnp.float32).reshape([-1 if i == axis % w.ndim else 1 for i in range(w.ndim)])
        weight = grouped(along, axis, group)

    def total(each: jax.Array) -> jax.Array:
        """The weighted sum over what shares a scale."""
        sums = jnp.sum(weight * each, axis=axis)
        return jnp.full_like(sums, jnp.sum(sums)) if format.scales == "matrix" else sums

    def centered(step: jax.Array, zeros: jax.Array) -> jax.Array:
        """Codes less their zero points."""
        return jnp.clip(jnp.round(split / spread(step)) + spread(zeros), format.low, format.high) - spread(zeros)

    def try_one(best: tuple[jax.Array, ...], tried: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        ratio, shift = tried
        moved = jnp.clip(zeros + shift, format.low, format.high)
        found = centered(jnp.full_like(unit, ratio), moved)
        product, square = total(split * found), total(jnp.square(found))
        step = jnp.where(square > 0, product / jnp.where(square > 0, square, 1.0), 0.0)
        now = product * step, step, moved  # the error is that of zeros less the first
        return jax.tree.map(lambda new, old: jnp.where(now[0] > best[0], new, old), now, best), None

    ratios, shifts = ([RATIOS, -RATIOS], (0.0, 0.0)) if format.symmetric else ([RATIOS] * len(SHIFTS), SHIFTS)
    tried = np.concatenate(ratios), np.repeat(np.float32(shifts), len(RATIOS))
    start = jnp.zeros_like(unit), jnp.zeros_like(unit), zeros
    (_, step, moved), _ = lax.scan(try_one, start, tried)
    scale = as_stored(jnp.where(step == 0, unit, step * unit), format)

    def error(scale: jax.Array, zeros: jax.Array) -> jax.Array:
        step = scale / unit
        return total(jnp.square(split - centered(step, zeros) * spread(step)))

    better = error(scale, moved) < error(unit, zeros)
    return as_stored(jnp.where(better, scale, unit), format), stored_zeros(jnp.where(better, moved, zeros))


def _round(w: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, format: Format) -> jax.Array:
    """int8 codes, not packed."""
    size = w.shape[axis]
    each = lambda per_group: by_entry(per_group.astype(jnp.float32), axis, format.group_in(size), size)
    rounded = jnp.round(w.astype(jnp.float32) / each(scale)) + (0.0 if zeros is None else each(zeros))
    return jnp.clip(rounded, format.low, format.high).astype(jnp.int8)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _packed(w: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, format: Format) -> jax.Array:
    return pack(_round(w, scale, zeros, axis, format), format.bits, axis)


def dequantize(w: Any) -> jax.Array:
    """The float matrix a weight stands for."""
    if isinstance(w, FakeQuantized):
        return w.value
    if isinstance(w, LowRank):
        base = dequantize(w.base)
        return (base.astype(jnp.float32) + jnp.matmul(w.a, w.b, precision="highest")).astype(base.dtype)
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
    return _floats(codes(w), scales(w), w.zeros, w.axis, w.group).astype(w.dtype)


def _floats(numbers: jax.Array, scale: jax.Array, zeros: jax.Array | None, axis: int, group: int) -> jax.Array:
    """What codes in the shape of the matrix stand for, float32."""
    each = lambda per_group: by_entry(per_group.astype(jnp.float32), axis, group, numbers.shape[axis])
    return (numbers.astype(jnp.float32) - (0.0 if zeros is None else each(zeros))) * each(scale)


def requantize(master: jax.Array, like: Any) -> Any:
    """A float master in the format of the weight `like`; of a LowRank weight in that of its base, so that it is one."""
    like = like.base if isinstance(like, LowRank) else like
    if not isinstance(like, QArray):
        return master.astype(like.dtype)
    return quantize_array(master.astype(like.dtype), like.axis, like.format, activation_scale=like.activation_scale)


def with_gradient_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, computed of x, with a gradient as if it were x: the straight-through estimator (Bengio 2013, arXiv
    1308.3432)."""
    return x + jax.lax.stop_gradient(value - x)


def straight_through(master: jax.Array, like: Any) -> Any:
    """Forward: what inference with `like` computes with. Backward: the identity.

    `master` rounded to the format of `like`; where that rounds activations too, marked so that `dot` does.
    """
    like = like.base if isinstance(like, LowRank) else like
    if not isinstance(like, QArray) and like.dtype == master.dtype:
        return master
    value = with_gradient_of(master, dequantize(requantize(master, like)).astype(master.dtype))
    if isinstance(like, QArray) and like.activations != "float":
        return FakeQuantized(value, like.activation_scale)
    return value


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
    zeros = None if table.zeros is None else table.zeros[indices]
    return dequantize(table.replace(values=table.values[indices], scale=table.scale[indices], zeros=zeros))


def take(w: Any, axis: int, indices: jax.Array) -> Any:
    """The slices `indices` of a matrix along an axis, in its format. Along the contracted axis of a matrix with groups
    these are formed anew, so values are rounded again."""
    if isinstance(w, LowRank):
        inputs = axis % w.ndim == 0
        part = {"a": jnp.take(w.a, indices, axis=0)} if inputs else {"b": jnp.take(w.b, indices, axis=1)}
        return w.replace(base=take(w.base, axis, indices), **part)
    if not isinstance(w, QArray):
        return jnp.take(w, indices, axis=axis)
    axis = axis % w.ndim - w.ndim
    if axis == w.axis and w.group:
        return requantize(jnp.take(dequantize(w), indices, axis=axis), w)
    kept = jnp.take(codes(w), indices, axis=axis)
    per_channel = lambda part: part if part is None or axis == w.axis else jnp.take(part, indices, axis=axis)
    parts = {"scale": per_channel(w.scale), "zeros": per_channel(w.zeros)}
    return w.replace(values=pack(kept, w.bits, w.axis), size=kept.shape[w.axis], **parts)


def apply_mask(w: Any, mask: jax.Array) -> Any:
    """The weight with exact zeros where the mask is False, in its format."""
    if isinstance(w, LowRank):
        return w.replace(base=apply_mask(w.base, mask))
    if not isinstance(w, QArray):
        return jnp.where(mask, w, jnp.zeros((), w.dtype))
    zero = jnp.int8(0) if w.zeros is None else by_entry(w.zeros, w.axis, w.group, w.size)
    return w.replace(values=pack(jnp.where(mask, codes(w), zero), w.bits, w.axis))
