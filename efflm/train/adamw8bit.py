"""Adam with both moments in 8 bits: block-wise dynamic quantization (Dettmers 2021, arXiv 2110.02861, section 2).

A moment of a matrix is one byte an entry, in the matrix's own shape, and a float32 scale for each block of 256 entries
along the last axis; so the state is sharded by the rules of its weight, and a leading axis of stacked layers changes
nothing. A scale is the largest magnitude of its block. Vectors (norms, biases) keep float32 moments, as in the paper:
they are few, and small errors in them cost most. A step reads the moments, takes one Adam step in float32, and
quantizes what it leaves.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from efflm import trees
from efflm.model.params import find

BLOCK = 256  # entries that share a scale
DECADES = 7  # powers of ten that the dynamic map spans, 1 downwards


@flax.struct.dataclass
class Quantized:
    """An array in 8 bits. values: codes in the array's shape, int8 (signed) or uint8 (never negative). scale: float32
    [..., ceil(last / 256)], the largest magnitude of each block. What they stand for: `dequantize`."""

    values: jax.Array
    scale: jax.Array


class Adam8bitState(NamedTuple):
    """As optax's ScaleByAdamState; the leaves of mu (int8) and nu (uint8) are Quantized, or float32 for vectors."""

    count: jax.Array
    mu: Any
    nu: Any


# --- the dynamic map -----------------------------------------------------------------------------------------------


def segments(signed: bool) -> list[tuple[int, float, float, int]]:
    """The map's runs of equally spaced values, ascending: (first code, first value, step, how many).

    The bits of a code are read from the left: a sign (signed only), zeros whose number is a power of ten, a 1, and a
    linear fraction of [0.1, 1] in what is left. So decade 10^(i - 6) holds 2^i values (unsigned: 2^(i + 1), the sign's
    bit going to the fraction), each the middle of its cell. The largest code stands for exactly 1 with either sign: the
    entry that its block's scale is read from comes back exactly. (In the paper this holds for + alone.) Code 0 is 0.
    """
    runs, code = [], 1
    for i in range(DECADES):
        top, cells = 10.0 ** (i - DECADES + 1), 2**i if signed else 2 ** (i + 1)
        count = cells - 1 if signed and i == DECADES - 1 else cells  # the last code of the signed map is for 1
        step = 0.9 * top / cells
        runs.append((code, 0.1 * top + step / 2, step, count))
        code += count
    return [*runs, (code, 1.0, 1.0, 1)]


def dynamic_map(signed: bool) -> np.ndarray:
    """The magnitude of each code, float64, ascending from 0 to 1: 128 of them if signed, else 256."""
    return np.concatenate([[0.0], *(first + step * np.arange(count) for _, first, step, count in segments(signed))])


def nearest_code(ratio: jax.Array, signed: bool) -> jax.Array:
    """The code of the map's value nearest to each ratio in [0, 1], as a float: computed, not searched for."""
    values, pick = dynamic_map(signed), lambda number: jnp.full_like(ratio, number)
    code, first, per_step, most = pick(0), pick(0), pick(0), pick(0)
    for start, value, step, count in segments(signed):
        here = ratio >= (values[start - 1] + values[start]) / 2
        code, first = jnp.where(here, start, code), jnp.where(here, value, first)
        per_step, most = jnp.where(here, 1 / step, per_step), jnp.where(here, count - 1, most)
    return code + jnp.clip(jnp.round((ratio - first) * per_step), 0, most)


# --- blocks --------------------------------------------------------------------------------------------------------


def block_scale(x: jax.Array) -> jax.Array:
    """The largest magnitude in each block of the last axis, [..., ceil(last / 256)]; the last block may be short."""
    blocks = -(-x.shape[-1] // BLOCK)
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, blocks * BLOCK - x.shape[-1])])
    return jnp.max(padded.reshape(*x.shape[:-1], blocks, BLOCK), axis=-1)


def spread(scale: jax.Array, last: int) -> jax.Array:
    """The scale of each entry, [..., last]: a broadcast, since a gather costs more than all the rest."""
    each = jnp.broadcast_to(scale[..., None], (*scale.shape, BLOCK))
    return each.reshape(*scale.shape[:-1], scale.shape[-1] * BLOCK)[..., :last]


@functools.partial(jax.jit, static_argnames="signed")  # traced once for all matrices of a shape
def quantize(x: jax.Array, signed: bool) -> Quantized:
    """Round a float32 array to the nearest values of the map, block by block; exact zeros stay zeros.

    An unsigned array holds second moments, by whose root is divided: a positive entry never becomes 0, but at least
    the map's smallest value (3e-7 of the scale). Otherwise a first moment over a second one that was rounded away
    would be a step of m / eps.
    """
    scale = block_scale(x)
    ratio = jnp.abs(x) * spread(1 / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), x.shape[-1])
    code = nearest_code(ratio, signed)
    if signed:
        return Quantized(jnp.where(x < 0, -code, code).astype(jnp.int8), scale)
    return Quantized(jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scale)


@jax.jit
def dequantize(q: Quantized) -> jax.Array:
    """The float32 array that codes and scales stand for."""
    signed = q.values.dtype == jnp.int8
    magnitudes = dynamic_map(signed).astype(np.float32)
    table = np.concatenate([magnitudes, [-1.0], -magnitudes[:0:-1]]) if signed else magnitudes  # in two's complement
    codes = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
    ratio = jnp.asarray(table, jnp.float32).at[codes].get(mode="promise_in_bounds")
    return ratio * spread(q.scale, q.values.shape[-1])


# --- the transformation --------------------------------------------------------------------------------------------


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v) + eps), both with bias correction (Kingma 2014, algorithm 1), from 8-bit moments.

    The step uses the moments before they are quantized again. At most 2.1 bytes of state a parameter where rows have
    some hundred entries: 2 + 8 / min(256, entries in a row), and 8 for the vectors.
    """

    def init(params):
        def zeros(path, w, signed):
            w = jax.ShapeDtypeStruct(w.shape, jnp.float32)
            param, _ = find(path)  # stacked vectors have two axes, but are vectors still
            vector = len(w.shape) < 2 or (param is not None and not param.is_matrix)
            kept = w if vector else jax.eval_shape(lambda w: quantize(w, signed), w)
            return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), kept)

        mu, nu = (trees.map_with_path(lambda path, w, s=s: zeros(path, w, s), params) for s in (True, False))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        correction1, correction2 = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def leaf(g, mu, nu):
            eight_bits = isinstance(mu, Quantized)
            if eight_bits:
                mu, nu = dequantize(mu), dequantize(nu)
            g = g.astype(jnp.float32)
            m = b1 * mu + (1 - b1) * g
            v = b2 * nu + (1 - b2) * jnp.square(g)
            direction = (m / correction1) / (jnp.sqrt(v / correction2) + eps)
            return (direction, quantize(m, True), quantize(v, False)) if eight_bits else (direction, m, v)

        grads, tree = jax.tree.flatten(updates)
        leaves = [leaf(*each) for each in zip(grads, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))]
        directions, mu, nu = (tree.unflatten([each[i] for each in leaves]) for i in range(3))
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)
