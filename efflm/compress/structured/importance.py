"""How important each slice of a layer is: a key-value head with the query heads that read it, a feed-forward channel.

What a slice adds to the residual stream passes through the matrix that reads it, so its rows there are what is scored.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.structured import slicing
from efflm.compress.structured.allocation import Scores
from efflm.config import require
from efflm.config.model import BlockConfig
from efflm.model import LanguageModel

# The matrix that reads the slices of an axis: its rows are theirs. The axis of weights (model.params) it contracts.
READERS = {"groups": ("attention/output/kernel", "heads"), "mlp": ("feedforward/down/kernel", "mlp")}
Importance = Literal["output", "activation", "magnitude", "taylor"]


@functools.partial(jax.jit, static_argnames="importance")
def scores(w: jax.Array, squares: jax.Array, importance: str) -> jax.Array:
    """Of each input of w float32 [K, N], [K]: the sum over tokens of the squared length of what it adds to the output,
    or of its square ("activation": Minitron, Muralidharan 2024, arXiv 2407.14679, section 2.2, with squares for
    magnitudes), or the squared length of its weights ("magnitude"). squares [K]: of the inputs, summed over tokens."""
    lengths = jnp.sum(jnp.square(w), axis=1)
    return {"output": squares * lengths, "activation": squares, "magnitude": lengths}[importance]


def by_slice(block: BlockConfig, axis: str, each: jax.Array) -> np.ndarray:
    """Of each slice along the axis, the sum over its inputs [K] of the reader: float64."""
    return np.asarray(each, np.float64).reshape(slicing.sizes(block)[axis], -1).sum(axis=1)


def largest(each: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest, in rising order; of equals the earlier ones."""
    return np.sort(np.argsort(-each, kind="stable")[:count])


def of_layer(layer: Layer, squares: Mapping[str, jax.Array], axis: str, importance: str) -> np.ndarray:
    """The `scores` of the slices of a layer along an axis. squares: {path: [K]} of what its matrices read."""
    (block,), (path, _) = layer.config.blocks, READERS[axis]
    w = ops.in_float32(dict(trees.flatten(layer.params))[path])
    return by_slice(block, axis, scores(w, squares[path], importance))


def measured(
    model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh, axes: Sequence[str], importance: str
) -> Scores:
    """The `scores` of every slice of the whole model. Those by "output" are divided by the sum over tokens of the
    squared length of the layer's output, so that layers compare: what is added to a long residual stream changes less
    of what the next norms give. Those of other kinds compare within a layer alone."""

    def one(layer: Layer, read: calibrate.States) -> tuple[Layer, Scores]:
        squares, energy = {path: states["squares"] for path, states in read.items()}, 1.0
        if importance == "output":
            energy = sum(float(_energy(x, row[-1])) for x, row in zip(layer.wanted, layer.rows, strict=True))
        scores = {axis: of_layer(layer, squares, axis, importance) / max(energy, 1e-30) for axis in axes}
        return layer, {(layer.index, axis): each for axis, each in scores.items()}

    given = {"mesh": mesh, "title": "importance", "reference": importance == "output"}
    _, found = calibrate.walk(model, rows, one, {"squares": calibrate.SQUARES}, **given)
    return functools.reduce(operator.or_, found)


@jax.jit
def _energy(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where((segments_BT > 0)[..., None], jnp.square(x_BTD), 0.0))


def taylor(model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh, axes: Sequence[str]) -> Scores:
    """Of every slice, the sum over rows of |sum over its weights w in the matrix that reads it of w * dL/dw|.

    L is the cross-entropy of a row, summed over its targets, in nats. The inner sum is the derivative of L by a gate
    that multiplies the slice, and so to first order what L changes by when the slice goes: the importance of a gate of
    Molchanov 2019 (arXiv 1906.10771, section 3), with the absolute value, as LLM-Pruner has it (Ma 2023, arXiv
    2305.11627, section 3.2), in place of the square. Scores of all layers compare. A row is read at a time, forward and
    backward; beside the weights in float32 there are the activations of that row and the gradients of the matrices that
    read slices, not of all weights. Raises InputError.
    """
    require(rows is not None, "Taylor importance needs calibration text: give a corpus")
    readers = {
        f"block_{i}/{READERS[axis][0]}": (i, axis, slicing.sizes(block)[axis])
        for i, block in enumerate(model.config.blocks)
        for axis in axes
    }

    def changes(total: jax.Array, w: jax.Array, gradient: jax.Array) -> jax.Array:
        return total + jnp.abs(jnp.sum(jnp.sum(w * gradient, axis=1).reshape(len(total), -1), axis=1))

    statistic = calibrate.Statistic(lambda path, _: jnp.zeros(readers[path][-1]), changes, of="gradients")
    of, title = readers.__contains__, "Taylor importance"
    found = calibrate.gradients(model, rows, {"taylor": statistic}, mesh, of, title)
    return {readers[path][:2]: np.asarray(states["taylor"], np.float64) for path, states in found.items()}
