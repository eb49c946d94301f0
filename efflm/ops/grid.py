"""The grid of a number format: which scales and zero points the groups of a float matrix get, as they are stored."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm.ops.format import Format

RATIOS = np.linspace(0.55, 1.15, 10, dtype=np.float32)  # of the range of a group, tried as its range
SHIFTS = (-1.0, 0.0, 1.0)  # of its zero point, tried with each
EXACT = 1 - 1e-6  # times a number that a division made, and that may be a whole one
LEAST_FLOAT16, MOST_FLOAT16 = 2.0**-17, 65504.0  # between them a float16 has at least the 8 bits of a bfloat16
Grid = tuple[jax.Array, jax.Array | None]  # scales float32, zeros int8; see as_stored
Rounding = Callable[[jax.Array], jax.Array]


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


def symmetric_scale(absmax: jax.Array, most: int) -> jax.Array:
    """The scale with which the largest magnitude is the code `most`; 1 where all is zero."""
    return jnp.where(absmax > 0, absmax / most, 1.0)


def _of_scales(format: Format) -> Format:
    """What of a format says how scales are stored: formats that store them alike share the programs for it."""
    blocks = {"group": format.group, "super_block": format.super_block} if format.super_block else {}
    return Format(scale_dtype=format.scale_dtype, **blocks)


def as_stored(scale: jax.Array, axis: int, format: Format) -> jax.Array:
    """float32 scales of groups, which lie along `axis`, as they are stored. None becomes 0 or infinite.

    They are rounded to the format's dtype of scales; "": to float16, where each keeps at least 8 significant bits in
    it: those between 2^-17 (a weight of 1e-6 in 4 bits) and 65504; otherwise all to bfloat16, whose range is that of
    float32. With super-blocks to whole numbers from -127 to 127 times a scale of 4 significant bits.
    """
    return _as_stored(scale, axis, _of_scales(format), jnp.round)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _as_stored(scale: jax.Array, axis: int, format: Format, rounding: Rounding) -> jax.Array:
    if not format.super_block or scale.shape[axis] == 1:
        return _rounded_to(scale, format.scale_dtype)
    codes, super_scale = _in_super_blocks(scale, axis, format, rounding)
    return codes * by_entry(super_scale, axis, format.groups_together, scale.shape[axis])


def in_super_blocks(scale: jax.Array, axis: int, format: Format) -> tuple[jax.Array, jax.Array]:
    """Whole numbers for the scales of groups, and the scales of super-blocks, both float32.

    A super-block's scale is 1/127 of the largest, rounded up to 4 significant bits: so that times a whole number of 7
    bits it is a float16. What is stored has the same numbers when it is stored again.
    """
    return _in_super_blocks(scale, axis, _of_scales(format), jnp.round)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _in_super_blocks(scale: jax.Array, axis: int, format: Format, rounding: Rounding) -> tuple[jax.Array, jax.Array]:
    spread = lambda x: by_entry(x, axis, format.groups_together, scale.shape[axis])
    largest = jnp.max(grouped(jnp.abs(scale), axis, format.groups_together), axis=axis)
    part, exponent = jnp.frexp(largest / 127)
    super_scale = _rounded_to(jnp.ldexp(jnp.ceil(part * 16 * EXACT) / 16, exponent), format.scale_dtype)
    found = jnp.abs(scale) / spread(super_scale)
    codes = jnp.where(jnp.abs(scale) == spread(largest), jnp.ceil(found * EXACT), rounding(found))
    return jnp.where(scale < 0, -1, 1) * jnp.clip(codes, 1, 127), super_scale


def _rounded_to(scale: jax.Array, dtype: str) -> jax.Array:
    """See `as_stored`."""
    if not dtype:
        return jnp.where(_in_float16(scale), _rounded_to(scale, "float16"), _rounded_to(scale, "bfloat16"))
    limits = jnp.finfo(dtype)
    least = limits.smallest_subnormal if dtype == "float16" else limits.tiny  # others are flushed to 0
    within = jnp.clip(jnp.abs(scale), float(least), float(limits.max)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale < 0, -within, within)


@jax.jit
def _in_float16(scale: jax.Array) -> jax.Array:
    magnitude = jnp.abs(scale)
    return jnp.all((magnitude >= LEAST_FLOAT16) & (magnitude <= MOST_FLOAT16))


def own_dtype(scale: jax.Array) -> str:
    """The dtype of scales that `as_stored` rounded to one of its own choice."""
    if isinstance(scale, jax.core.Tracer):
        return "float32"
    return "float16" if _in_float16(scale) else "bfloat16"


def grid_of(w: jax.Array, axis: int, format: Format, importance: jax.Array | None = None) -> Grid:
    """The scales and zeros of the groups of a float matrix, each with `axis` reduced to groups (see Format).

    axis: counted from the end. The scales are as they are stored, in float32. Where the format clips (below 8 bits), a
    range of each group is searched for the least squared error weighted by `importance`, float32 [size of axis], of
    each input the sum of its squares (the diagonal of X^T X). Without it the weight is the magnitude plus the root mean
    square of the group, as in llama.cpp's K-quants: on stories15M in 4, 3 and 2 bits better than squared magnitudes,
    than none and than no search. Tried are parts of the range, both signs of a symmetric grid and shifted zero points,
    each with the scale that is best for the codes it gives (least squares). The whole range stays where none has a
    smaller error; with super-blocks in all of their groups or in none.

    With an entropy of H bits the scale is that of a uniform grid on which a normal variable of the output's root mean
    square has that entropy, sqrt(2 pi e) / 2^H of it (from 2 bits on to 4%): of one entropy, and so in one size of an
    entropy-coded file, a uniform grid has less error than ranges of groups (Gish and Pierce 1968).
    """
    searched = format.clip and format.bits < 8  # at 8 no search makes a difference to a model that can be measured
    # One program is compiled for all bits, for all entropies, and for all that have no effect on the grid.
    own = {"group": format.group_in(w.shape[axis]), "super_block": format.super_block_in(w.shape[axis])}
    own |= {"entropy": 1.0 if format.entropy else 0.0}
    same = dataclasses.replace(format, bits=8, clip=searched, activations="float", coded=False, **own)
    low, width = jnp.float32(format.low), jnp.float32(math.sqrt(2 * math.pi * math.e) / 2**format.entropy)
    return _grid_of(w, axis, same, low, width, importance if searched else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grid_of(
    w: jax.Array, axis: int, format: Format, low: jax.Array, width: jax.Array, importance: jax.Array | None
) -> Grid:
    """The same, of codes from `low` on, whatever the format's bits, and where there is an entropy with steps of
    `width` root mean squares of the output, whatever the format's entropy."""
    if format.entropy:
        step = width * jnp.sqrt(jnp.mean(jnp.square(w.astype(jnp.float32)), axis=axis, keepdims=True))
        return as_stored(jnp.where(step == 0, 1.0, step), axis, format), None
    group, steps, high = format.group_in(w.shape[axis]), -2 * low - 1, -low - 1
    split = grouped(w.astype(jnp.float32), axis, group)  # the entries of a group now lie along `axis`
    bottom, top = jnp.minimum(jnp.min(split, axis), 0.0), jnp.maximum(jnp.max(split, axis), 0.0)
    if format.scales == "matrix":
        bottom, top = jnp.full_like(bottom, jnp.min(bottom)), jnp.full_like(top, jnp.max(top))
    if format.symmetric:
        unit = jnp.where(top > -bottom, top, bottom) / low
        zeros = jnp.zeros_like(unit)
    else:
        unit = (top - bottom) / steps
        zeros = jnp.clip(jnp.round(-bottom / jnp.where(unit == 0, 1.0, unit)) + low, low, high)
    stored_zeros = lambda zeros: None if format.symmetric else zeros.astype(jnp.int8)

    def of_blocks(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """For each group, `reduce` over all groups whose scales are stored together."""
        if not format.super_block_in(w.shape[axis]):
            return x
        found = reduce(grouped(x, axis, format.groups_together), axis=axis)
        return by_entry(found, axis, format.groups_together, x.shape[axis])

    def filled(scale: jax.Array) -> jax.Array:
        """With scales for groups of zeros that change no other scale."""
        most = of_blocks(jnp.max, jnp.abs(scale))
        return jnp.where(scale == 0, jnp.where(most == 0, 1.0, most), scale)

    plain, unit = unit, _as_stored(filled(unit), axis, format, jnp.ceil)
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
        return jnp.clip(jnp.round(split / spread(step)) + spread(zeros), low, high) - spread(zeros)

    def try_one(best: tuple[jax.Array, ...], tried: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        ratio, shift = tried
        moved = jnp.clip(zeros + shift, low, high)
        found = centered(jnp.full_like(unit, ratio), moved)
        product, square = total(split * found), total(jnp.square(found))
        step = jnp.where(square > 0, product / jnp.where(square > 0, square, 1.0), 0.0)
        now = product * step, step, moved  # the error is that of zeros less the first
        return jax.tree.map(lambda new, old: jnp.where(now[0] > best[0], new, old), now, best), None

    ratios, shifts = ([RATIOS, -RATIOS], (0.0, 0.0)) if format.symmetric else ([RATIOS] * len(SHIFTS), SHIFTS)
    tried = np.concatenate(ratios), np.repeat(np.float32(shifts), len(RATIOS))
    start = jnp.zeros_like(unit), jnp.zeros_like(unit), zeros
    (_, step, moved), _ = lax.scan(try_one, start, tried)
    scale = filled(jnp.where(step == 0, plain, step * unit))

    def error(scale: jax.Array, zeros: jax.Array) -> jax.Array:
        step = scale / unit
        return jnp.square(unit) * total(jnp.square(split - centered(step, zeros) * spread(step)))

    if format.super_block_in(w.shape[axis]):
        less, more = (_as_stored(scale, axis, format, rounding) for rounding in (jnp.floor, jnp.ceil))
        scale = jnp.where(error(more, moved) < error(less, moved), more, less)
    scale = as_stored(scale, axis, format)
    better = of_blocks(jnp.sum, error(scale, moved)) < of_blocks(jnp.sum, error(unit, zeros))
    return as_stored(jnp.where(better, scale, unit), axis, format), stored_zeros(jnp.where(better, moved, zeros))
