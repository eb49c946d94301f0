"""How important each slice of a layer is: a key-value head with the query heads that read it, a feed-forward channel.

What a slice adds to the residual stream passes through the matrix that reads it, so its rows there are what is scored.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm import ops, trees
from efflm.cli import progress
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.step import masters
from efflm.compress.structured import slicing
from efflm.compress.structured.allocation import Scores
from efflm.config import require
from efflm.config.model import BlockConfig, ModelConfig
from efflm.model import LanguageModel, placement
from efflm.parallel import sharding
from efflm.train.losses import language_model_loss

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
    found: dict[tuple[int, str], np.ndarray] = {}

    def one(layer: Layer, read: calibrate.States) -> Layer:
        squares, energy = {path: states["squares"] for path, states in read.items()}, 1.0
        if importance == "output":
            energy = sum(float(_energy(layer(layer.params, *row), row[-1])) for row in layer.rows)
        for axis in axes:
            found[layer.index, axis] = of_layer(layer, squares, axis, importance) / max(energy, 1e-30)
        return layer

    calibrate.map_blocks(model, rows, {"squares": calibrate.SQUARES}, one, mesh=mesh, title="importance")
    return found


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
    model = model.replace(params=masters(model), masks=None)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(model.params, placement.shardings(model.params, mesh))
    fields = {name: np.asarray(rows[name], np.int32) for name in ("inputs", "targets", "positions", "segments")}
    blocks, count = model.config.blocks, len(fields["inputs"])
    found = {(i, axis): np.zeros(slicing.sizes(block)[axis]) for i, block in enumerate(blocks) for axis in axes}
    for index in progress.shown(range(count), "Taylor importance: rows", count):
        row = jax.device_put({name: field[index : index + 1] for name, field in fields.items()}, whole)
        changes = jax.block_until_ready(_changes(model.config, tuple(axes), params, row))
        for (layer, axis), total in found.items():
            total += np.abs(by_slice(blocks[layer], axis, changes[f"block_{layer}/{READERS[axis][0]}"]))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _changes(config: ModelConfig, axes: tuple[str, ...], params: Any, row: dict[str, jax.Array]) -> dict:
    """{path of a matrix that reads slices: of each of its inputs the sum of w * dL/dw, [K]} for a row."""
    paths = {f"block_{i}/{READERS[axis][0]}" for i in range(len(config.blocks)) for axis in axes}
    readers = {path: w for path, w in trees.flatten(params) if path in paths}

    def loss(readers):
        all_weights = trees.map_with_path(lambda path, w: readers.get(path, w), params)
        mean, parts = language_model_loss(config)(all_weights, {}, row, None)
        return mean * parts["weight"]

    with sharding.mesh_of(row):
        gradients = jax.grad(loss)(readers)
    return {path: jnp.sum(w * gradients[path], axis=1) for path, w in readers.items()}
