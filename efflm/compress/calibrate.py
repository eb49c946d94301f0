"""A model run over calibration text one layer at a time, with statistics of what its linear layers read.

Frantar 2022 (arXiv 2210.17323) and Sun 2023 (arXiv 2306.11695) compress a layer from its inputs, and run the compressed
layer to make the inputs of the next one. One layer's inputs are held at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from efflm import malloc
from efflm.cli import progress
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise, placement
from efflm.parallel import sharding

CHUNK = 4  # rows that are read at a time


class Statistic(NamedTuple):
    """init: number of inputs K -> state. update: state, x float32 [n, K], counted bool [n, 1] -> state.

    x is zero in the rows that are not counted: padding.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array, jax.Array], Any]


# Of each input over all tokens, float32 [K]: the largest magnitude, the sum of magnitudes, the sum of squares.
LARGEST = Statistic(lambda K: jnp.zeros(K), lambda most, x, _: jnp.maximum(most, jnp.max(jnp.abs(x), axis=0)))
MAGNITUDES = Statistic(lambda K: jnp.zeros(K), lambda total, x, _: total + jnp.sum(jnp.abs(x), axis=0))
SQUARES = Statistic(lambda K: jnp.zeros(K), lambda total, x, _: total + jnp.sum(jnp.square(x), axis=0))
# X^T X, float32 [K, K], and how many tokens there were.
GRAM = Statistic(lambda K: jnp.zeros((K, K)), lambda gram, x, _: gram + jnp.matmul(x.T, x, precision="highest"))
TOKENS = Statistic(lambda K: jnp.float32(0), lambda count, x, counted: count + jnp.sum(counted))


States = dict[str, dict[str, Any]]  # {path in the layer of a weight: {name of a statistic: its state}}


@flax.struct.dataclass
class Layer:
    """A layer and what it reads. params: without `block_i`; masks: of them, {path: bool array}, where there are any.

    rows: its inputs, chunk by chunk: x float32 [n, T, D], positions and segments int32 [n, T].
    """

    params: Any
    masks: Mapping[str, jax.Array]
    rows: list[tuple[jax.Array, jax.Array, jax.Array]]
    config: ModelConfig = flax.struct.field(pytree_node=False)
    index: int = flax.struct.field(pytree_node=False)

    def __call__(self, params: Any, *row: jax.Array) -> jax.Array:
        """The output [n, T, D] with these weights."""
        return run(self.config, params, *row)


@malloc.least()
def map_blocks(
    model: LanguageModel,
    rows: Mapping[str, Any] | None,
    statistics: Mapping[str, Statistic],
    fn: Callable[[Layer, States], Layer],
    *,
    mesh: Mesh,
    title: str = "calibrating",
) -> LanguageModel:
    """The model whose layers `fn` made of its layers, each fed by those already made.

    rows: a batch (data.packing): inputs, positions and segments int32 [N, T]; segment 0 is padding. fn is given a layer
    and the statistics of what each of its linear layers reads; those that read the same share a state. Of the layer it
    changes params and masks, and config where they have other shapes. Raises InputError.
    """
    require(rows is not None, f"{title} needs calibration text: give a corpus")
    if mesh.size > 1:
        model = jax.device_put(model, placement.shardings(model, mesh))
    chunks = inputs(model, rows, mesh)
    params, masks = dict(model.params), dict(model.masks or {})
    blocks = list(model.config.blocks)
    packed: dict[str, tuple[int, jax.Array]] = {}  # masks of the layers that are made, eight entries in a byte
    count = len(model.config.blocks)
    for index in progress.shown(range(count), f"{title}: layers", count):
        name, single = f"block_{index}", layerwise.block_config(model.config, index)
        own = {path.removeprefix(f"{name}/"): mask for path, mask in masks.items() if path.startswith(f"{name}/")}
        layer = Layer(params[name], own, chunks, single, index)
        after = fn(layer, gathered(layer, statistics))
        params[name], (blocks[index],) = after.params, after.config.blocks
        packed |= {f"{name}/{path}": (mask.shape[-1], _packed(mask)) for path, mask in after.masks.items()}
        if index + 1 < count:
            for i, row in enumerate(chunks):  # in place: of two lists only one fits beside a large model
                chunks[i] = (jax.block_until_ready(after(after.params, *row)), *row[1:])
        malloc.trim()
    del chunks, layer, after
    masks |= {path: _unpacked(mask, size) for path, (size, mask) in packed.items()}
    config = dataclasses.replace(model.config, blocks=tuple(blocks))
    return model.replace(config=config, params=params, masks=masks or None)


@jax.jit
def _packed(mask: jax.Array) -> jax.Array:
    return jnp.packbits(mask, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _unpacked(packed: jax.Array, size: int) -> jax.Array:
    return jnp.unpackbits(packed, axis=-1, count=size).astype(bool)


def gathered(layer: Layer, statistics: Mapping[str, Statistic]) -> States:
    """{path: {name: state}} over all rows of a layer."""
    if not statistics:
        return {}
    names, made = tuple(statistics), tuple(statistics.values())
    states = None
    for row in layer.rows:
        # One program at a time: several at once, each of which waits for all devices, can wait for each other.
        states = jax.block_until_ready(_update(layer.config, names, made, layer.params, states, *row))
    return {path: dict(zip(names, states[group])) for group in states for path in group.split(" ")}


def inputs(model: LanguageModel, rows: Mapping[str, Any], mesh: Mesh) -> list[tuple[jax.Array, ...]]:
    """The `rows` of the first layer, chunk by chunk."""
    split = chunks(rows, ("inputs", "positions", "segments"), mesh)
    embed = lambda *read: jax.block_until_ready(_embed(model.config, model.params, *read))
    return [(embed(tokens, positions), positions, own) for tokens, positions, own in split]


def chunks(rows: Mapping[str, Any], names: Sequence[str], mesh: Mesh) -> list[tuple[jax.Array, ...]]:
    """These fields of a batch, int32 [n, T] on the mesh, CHUNK rows or a row for each device at a time.

    The last chunk is filled up with padding, so that one program reads every chunk.
    """
    spread, devices = NamedSharding(mesh, sharding.BATCH), mesh.devices.size
    fields, out = [np.asarray(rows[name]) for name in names], []
    size = max(min(CHUNK, len(fields[0])) // devices, 1) * devices
    for start in range(0, len(fields[0]), size):
        parts = (field[start : start + size] for field in fields)
        filled = (np.pad(part, ((0, size - len(part)), (0, 0))).astype(np.int32) for part in parts)
        out.append(tuple(jax.device_put(part, spread) for part in filled))
    return out


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: ModelConfig, params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    with sharding.mesh_of(tokens):
        return layerwise.embed(LanguageModel(config, params), tokens, positions)


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params: Any, *row: jax.Array) -> jax.Array:
    """The output [n, T, D] of the layer of a `layerwise.block_config`, for one chunk of rows."""
    with sharding.mesh_of(row):
        return layerwise.apply_block(config, params, *row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _update(
    config: ModelConfig,
    names: tuple[str, ...],
    statistics: tuple[Statistic, ...],
    params: Any,
    states: Any,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
) -> dict[str, tuple[Any, ...]]:
    """{paths that read the same, joined by spaces: a state of each statistic}, after one more chunk."""
    with sharding.mesh_of(x):
        read = layerwise.reads(config, params, x, positions, segments)
    same: dict[int, list[str]] = {}
    for path, array in read.items():
        same.setdefault(id(array), []).append(path)
    counted, after = (segments > 0).reshape(-1, 1), {}
    for paths in same.values():
        group, each = " ".join(paths), read[paths[0]]
        each = jnp.where(counted, each.reshape(counted.size, -1).astype(jnp.float32), 0.0)
        before = states[group] if states else tuple(one.init(each.shape[1]) for one in statistics)
        after[group] = tuple(one.update(state, each, counted) for one, state in zip(statistics, before, strict=True))
    return after
