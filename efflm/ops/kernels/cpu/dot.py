"""Matmuls with weights laid out for the native kernels: the layouts, and the calls.

Dense weights are used as they are. Of quantized ones 32 outputs lie side by side: a panel holds for every 4 inputs (8
bits), 8 (4 bits) or 16 (2 bits) one word of 4 bytes for each output, for 3 bits one and a half for 16. Codes of 5, 6
and 7 bits lie there as codes of 8. See src/codes.h.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from efflm.ops.kernels.cpu import build
from efflm.ops.norm import Normed, normalize
from efflm.ops.qarray import QArray, codes, zero_points

PANEL = 32
UNITS = {8: 8, 4: 8, 3: 16, 2: 16}  # of groups: how many inputs they are multiples of, and are filled up to
# Where in a byte the codes of every next four inputs lie; of 3 bits the lower two, and the upper one of the first 16
# outputs of a panel: that of the others lies two bits further on.
PLACES = {8: (0,), 4: (0, 4), 3: (0, 4, 2, 6), 2: (0, 2, 4, 6)}
UPPER = (0, 4, 1, 5)
ACTIVATIONS = ("silu", "gelu_tanh")  # of a gate, as numbered in src/feedforward.h
MOST_WEIGHTS = 8  # of one call, as in src/kernels.cc
MOST_INPUTS = 65_000  # beyond which sums of products of 8-bit codes may not fit into 32 bits
# Rows up to which a dense weight has a kernel, by its dtype; beyond them XLA's matmul is the faster one.
FEW_ROWS = {"float32": 12, "bfloat16": 16}


@flax.struct.dataclass
class Panels:
    """A quantized matrix in panels. Only for computing on this machine: made by ops.prepare, never saved.

    values: uint8 [panels, steps, 32, 4], for 3 bits [panels, steps, 32 + 16, 4]; scale: [panels, groups, 32], of the
    QArray's dtype; zeros: int8 like scale, or None; super_scale: [panels, super-blocks, 32], or None. The other fields
    are the QArray's; `outputs` is the size of the axis that is not contracted.
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
    super_block: int = flax.struct.field(pytree_node=False, default=0)
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
    return w.ndim == 2 and w.size <= MOST_INPUTS and w.group % UNITS[_bits(w)] == 0


def _bits(w: QArray) -> int:
    """Of a code in panels."""
    return w.bits if w.bits in UNITS else 8


def panels(w: QArray, form: str) -> Panels:
    """A quantized matrix laid out in panels, by numpy on the host."""
    here = jax.tree.map(np.asarray, w)
    by_output = lambda x: x if w.axis == -1 else x.T
    numbers, bits = by_output(codes(here)), _bits(w)
    outputs, size = numbers.shape
    fill = lambda x, inputs: np.pad(x, ((0, -outputs % PANEL), (0, inputs)))
    biased = (fill(numbers, -size % UNITS[bits]).astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    fours = biased.reshape(len(biased) // PANEL, PANEL, -1, len(PLACES[bits]), 4).swapaxes(1, 2)
    words = _merged(fours & 3 if bits == 3 else fours, PLACES[bits])
    if bits == 3:
        first, second = (_merged(half, UPPER) for half in np.split(fours >> 2, 2, axis=2))
        words = np.concatenate([words, first | second << 2], axis=2)

    def of_groups(x: np.ndarray | None) -> jax.Array | None:
        if x is None:
            return None
        return jax.device_put(fill(by_output(x), 0).reshape(-1, PANEL, x.shape[w.axis]).swapaxes(1, 2))

    return Panels(
        jax.device_put(words),
        of_groups(here.scale),
        of_groups(zero_points(here)),
        w.activation_scale,
        of_groups(here.super_scale),
        bits=bits,
        axis=w.axis,
        group=w.group,
        super_block=w.super_block,
        size=size,
        outputs=outputs,
        activations=w.activations,
        dtype=w.dtype,
        form=form,
    )


def _merged(fours: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """uint8 [..., fours, 4] -> [..., 4]: those of every four inputs at their places in the bytes of a word."""
    return np.bitwise_or.reduce(fours << np.array(places, np.uint8)[:, None], axis=-2)


def rows(table: Panels, indices: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D] in panels, as floats of its dtype."""
    return outputs(table, indices) if table.axis == -1 else unpacked(table)[indices]


def unpacked(w: Panels) -> jax.Array:
    """The whole matrix as floats of its dtype."""
    by_output = outputs(w, jnp.arange(w.outputs))
    return by_output if w.axis == -1 else by_output.T


def outputs(table: Panels, indices: jax.Array) -> jax.Array:
    """The weights [..., size] of some outputs, as floats of its dtype."""
    panel, output = indices // PANEL, indices % PANEL

    def spread(part: jax.Array, entries: int) -> jax.Array:
        return jnp.repeat(part[panel, :, output].astype(jnp.float32), entries, axis=-1)[..., : table.size]

    scale = spread(table.scale, table.group or table.size)
    if table.super_block:
        scale = scale * spread(table.super_scale, table.super_block)
    fours = lambda words, places: jnp.stack([words >> place for place in places], axis=-2)
    biased = fours(table.values[panel, :, output], PLACES[table.bits]) & (3 if table.bits == 3 else 2**table.bits - 1)
    if table.bits == 3:
        second, word = jnp.divmod(output, PANEL // 2)
        upper = table.values[panel, :, PANEL + word] >> (2 * second[..., None, None]).astype(jnp.uint8)
        biased |= (fours(upper, UPPER) & 1) << 2
    numbers = biased.reshape(*indices.shape, -1)[..., : table.size].astype(jnp.float32) - 2 ** (table.bits - 1)
    if table.zeros is not None:
        numbers = numbers - spread(table.zeros, table.group or table.size)
    return (numbers * scale).astype(table.dtype)


def _fits(x: Any, w: Any, rows: int, transposed: bool = False) -> bool:
    """Whether a kernel multiplies `rows` rows with this weight. With dense ones XLA is faster where rows are many, and
    would round bfloat16 rows and a float32 matrix differently. Panels are multiplied along the axis of their groups."""
    if isinstance(w, Panels):
        return w.axis == (-1 if transposed else -2)
    mixed = isinstance(w, Dense) and (str(x.dtype), str(w.value.dtype)) == ("bfloat16", "float32")
    return isinstance(w, Dense) and rows <= FEW_ROWS[str(w.value.dtype)] and not mixed


def _require_shapes(x: Any, *weights: tuple[int, int], residual: jax.Array | None) -> None:
    """Raise ValueError unless x [..., K] and its norm fit matrices of the shapes [K, N], and a residual their products:
    the kernels would read other memory."""
    K, lead = x.shape[-1], x.shape[:-1]
    for shape in weights:
        if shape[0] != K:
            raise ValueError(f"rows of shape {x.shape} have {K} entries each, but the matrix {shape} reads {shape[0]}")
        if residual is not None and residual.shape != (*lead, shape[1]):
            raise ValueError(f"the residual has shape {residual.shape}, but the product {(*lead, shape[1])}")
    if isinstance(x, Normed):
        for name, part in (("scale", x.scale), ("bias", x.bias)):
            if part is not None and part.shape != (K,):
                raise ValueError(f"the {name} of a norm has shape {part.shape}, but the rows have {K} entries each")


def _call(name: str, x: Any, weights: Sequence[Any], residual: Any, transposed: bool, outs: Any, extra=()) -> Any:
    """One call of a kernel that reads rows and weights."""
    if isinstance(x, Normed) and x.dtype in ("float32", "bfloat16"):
        rows, norm, attributes = x.x, (x.scale, x.bias), {"epsilon": x.epsilon, "to_bfloat16": x.dtype == "bfloat16"}
    else:
        rows, norm, attributes = normalize(x), (None, None), {"epsilon": 0.0, "to_bfloat16": False}
    if rows.dtype not in (jnp.float32, jnp.bfloat16):
        rows = rows.astype(jnp.float32)
    array = lambda part, dtype=jnp.float32: jnp.zeros(0, dtype) if part is None else part.astype(dtype)
    arrays, described = [], []
    for w in weights:
        if isinstance(w, Panels):
            scale, scale_codes = (w.super_scale, w.scale) if w.super_block else (w.scale, None)
            static = w.activation_scale if w.activations == "int8_static" else None
            arrays += [w.values, scale, array(w.zeros, jnp.int8), array(static), array(scale_codes, jnp.int8)]
            groups = w.super_block // w.group if w.super_block else 1  # a power of two
            described += [w.bits, 0, int(w.activations != "float"), w.group, groups.bit_length() - 1]
        else:
            arrays += [w.value, array(None), array(None, jnp.int8), array(None), array(None, jnp.int8)]
            described += [8 * w.value.dtype.itemsize, int(transposed), 0, 0, 0]
    call = jax.ffi.ffi_call(build.target(name, weights[0].form), outs, vmap_method="sequential")
    return call(
        rows, array(norm[0]), array(norm[1]), array(residual), *arrays,
        epsilon=np.float32(attributes["epsilon"]), to_bfloat16=attributes["to_bfloat16"],
        weights=np.array([*described, *extra], np.int64),
    )  # fmt: skip


def dots(
    x: Any, weights: Sequence[Any], residual: jax.Array | None = None, transposed: bool = False
) -> list[jax.Array] | None:
    """x [..., K], an array or Normed, times each weight, plus a residual -> float32 [..., N]; None: no kernel fits.

    transposed: dense weights are [N, K].
    """
    lead = x.shape[:-1]
    if not weights or not all(_fits(x, w, math.prod(lead), transposed) for w in weights):
        return None
    shapes = [w.shape[::-1] if transposed else w.shape for w in weights]
    _require_shapes(x, *shapes, residual=residual)
    outs = [jax.ShapeDtypeStruct((*lead, shape[1]), jnp.float32) for shape in shapes]
    found = []
    for i in range(0, len(weights), MOST_WEIGHTS):
        some = slice(i, i + MOST_WEIGHTS)
        found += _call("efflm_dots", x, weights[some], residual, transposed, outs[some])
    return found


def feedforward(
    x: Any, gate: Any, up: Any, down: Any, residual: jax.Array | None, dtype: Any, activation: str
) -> jax.Array | None:
    """See ops.gated_feedforward; None: no kernel fits."""
    lead, weights = x.shape[:-1], (gate, up, down)
    low = str(jnp.dtype(dtype)) == "bfloat16"
    fits = all(_fits(x, w, math.prod(lead)) for w in weights) and jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)
    if not fits or 0 in lead or str(x.dtype) != str(jnp.dtype(dtype)) or (low and not isinstance(x, Normed)):
        return None
    _require_shapes(x, gate.shape, up.shape, residual=None)
    hidden = jax.ShapeDtypeStruct((*lead, gate.shape[1]), dtype)
    if up.shape != gate.shape:
        raise ValueError(f"the matrix of gates has shape {gate.shape}, but the other one {up.shape}")
    _require_shapes(hidden, down.shape, residual=residual)
    out = jax.ShapeDtypeStruct((*lead, down.shape[1]), jnp.float32)
    return _call(
        "efflm_feedforward", x, weights, residual, False, out, extra=(gate.shape[1], ACTIVATIONS.index(activation))
    )
