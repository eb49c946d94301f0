"""A walk over the layers of a model with calibration text, with statistics of what its linear layers read and give.

Frantar 2022 (arXiv 2210.17323) and Sun 2023 (arXiv 2306.11695) compress a layer from its inputs, and run the compressed
layer to make the inputs of the next one. One layer's inputs are held at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm import malloc, ops, trees
from efflm.cli import progress
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise, placement
from efflm.model.params import in_layer
from efflm.parallel import sharding
from efflm.train.losses import language_model_loss

CHUNK = 4  # rows that are read at a time


class Statistic(NamedTuple):
    """What is gathered of every matrix of the linear layers: a state, and how it goes on.

    of="inputs": of what the matrix reads. init: number of inputs K -> state. update: state, x float32 [n, K], counted
    bool [n, 1] -> state; x is zero in the rows that are not counted: padding. of="outputs": the same of x W, [n, N].
    of="pairs": of what it reads here and in the model as it was. update: state, x, reference [n, K], counted -> state.
    of="gradients": init: path, (K, N) -> state. update: state, w, gradient [K, N] -> state, once for each row of text:
    the gradient of the cross-entropy of the model as it was, summed over the row's targets, in nats.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    of: Literal["inputs", "outputs", "pairs", "gradients"] = "inputs"


# Of each input over all tokens, float32 [K]: the largest magnitude, the sum of magnitudes, the sum of squares.
LARGEST = Statistic(lambda K: jnp.zeros(K), lambda most, x, _: jnp.maximum(most, jnp.max(jnp.abs(x), axis=0)))
MAGNITUDES = Statistic(lambda K: jnp.zeros(K), lambda total, x, _: total + jnp.sum(jnp.abs(x), axis=0))
SQUARES = Statistic(lambda K: jnp.zeros(K), lambda total, x, _: total + jnp.sum(jnp.square(x), axis=0))
# The sum of squares, each as a share of the mean square of its token's inputs: tokens count the same however large.
SHARES = Statistic(
    lambda K: jnp.zeros(K),
    lambda total, x, _: (
        total + jnp.sum(jnp.square(x) / jnp.maximum(jnp.mean(jnp.square(x), axis=1, keepdims=True), 1e-30), axis=0)
    ),
)
# X^T X, float32 [K, K], and how many tokens there were.
GRAM = Statistic(lambda K: jnp.zeros((K, K)), lambda gram, x, _: gram + jnp.matmul(x.T, x, precision="highest"))
# X^T (X0 - X), float32 [K, K]: X0 is what the model as it was reads. Tokens that it gave another expert do not count.
SHIFT = Statistic(
    lambda K: jnp.zeros((K, K)),
    lambda total, x, before, _: (
        total + jnp.matmul(x.T, jnp.where(jnp.any(before != 0, 1, keepdims=True), before - x, 0.0), precision="highest")
    ),
    of="pairs",
)
TOKENS = Statistic(lambda K: jnp.float32(0), lambda count, x, counted: count + jnp.sum(counted))
# The diagonal of the empirical Fisher information: the sum of squared gradients, float32 [K, N].
FISHER = Statistic(lambda _, shape: jnp.zeros(shape), lambda total, w, g: total + jnp.square(g), of="gradients")

# The linear layers of a layer in the order in which they compute; those beside each other read the same.
SUBLAYERS = (
    ("attention/query", "attention/key", "attention/value"),
    ("attention/output",),
    ("feedforward/gate", "feedforward/up"),
    ("feedforward/down",),
)

States = dict[str, dict[str, Any]]  # {path in the layer of a weight: {name of a statistic: its state}}


@flax.struct.dataclass
class Layer:
    """A layer and what it reads. params: without `block_i`; masks: of them, {path: bool array}, where there are any.

    index: its number; None: it is the output layer, with the final norm, and config is the model's. rows: its inputs,
    chunk by chunk: x float32 [n, T, D], positions and segments int32 [n, T]. wanted: where the walk has a reference,
    what the layer gives in the model as it was, chunk by chunk; of the output layer, what it reads there.
    """

    params: Any
    masks: Mapping[str, jax.Array]
    rows: list[tuple[jax.Array, jax.Array, jax.Array]]
    wanted: list[jax.Array]
    config: ModelConfig = flax.struct.field(pytree_node=False)
    index: int | None = flax.struct.field(pytree_node=False)

    def path(self, inside: str) -> str:
        """The path in the model of a weight of the layer."""
        return inside if self.index is None else f"block_{self.index}/{inside}"

    def __call__(self, params: Any, *row: jax.Array) -> jax.Array:
        """The output [n, T, D] with these weights."""
        return layer_output(self.config, params, *row)


@malloc.least()
def walk(
    model: LanguageModel,
    rows: Mapping[str, Any] | None,
    fn: Callable[[Layer, States], tuple[Layer, Any]],
    statistics: Mapping[str, Statistic] = MappingProxyType({}),
    *,
    mesh: Mesh,
    title: str | None = "calibrating",
    sublayers: bool = False,
    output: bool = False,
    reference: bool = False,
) -> tuple[LanguageModel, list[Any]]:
    """The model whose layers `fn` made of its layers, each fed by those already made, and what fn found, call by call.

    rows: a batch (data.packing): inputs, positions and segments int32 [N, T]; segment 0 is padding. fn is given a layer
    and the statistics of its linear layers; of inputs those that read the same share a state. Of the layer it changes
    params and masks, and config where they have other shapes.
    sublayers: fn is called for each of SUBLAYERS in turn, with their statistics alone, of what they read where those
    before them are made already. output: at last it is called for the matrix of the logits, or the table [V, D] that
    gives them. reference: the model as it was runs beside (Layer.wanted), as for pairs. title: of the bar; None: no
    bar. In memory are one layer's inputs, and with a reference its outputs there. Raises InputError.
    """
    require(rows is not None, f"{title or 'calibrating'} needs calibration text: give a corpus")
    if mesh.size > 1:
        model = jax.device_put(model, placement.shardings(model, mesh))
    kinds = {one.of for one in statistics.values()}
    first = gradients(model, rows, statistics, mesh) if "gradients" in kinds else {}
    chunks = inputs(model, rows, mesh)
    wanted = [x for x, *_ in chunks] if reference or "pairs" in kinds else []
    same = bool(wanted)  # whether both models are still the same
    params, masks = dict(model.params), dict(model.masks or {})
    blocks, found = list(model.config.blocks), []
    packed: dict[str, tuple[int, jax.Array]] = {}  # masks of the layers that are made, eight entries in a byte
    count = len(model.config.blocks)
    for index in progress.shown(range(count), f"{title}: layers", count) if title else range(count):
        name, single = f"block_{index}", layerwise.block_config(model.config, index)
        own = {path.removeprefix(f"{name}/"): mask for path, mask in masks.items() if path.startswith(f"{name}/")}
        read_there = list(wanted) if "pairs" in kinds else []
        for i, (x, row) in enumerate(zip(wanted, chunks)):
            wanted[i] = jax.block_until_ready(layer_output(single, params[name], x, *row[1:]))
        before = layer = Layer(params[name], own, chunks, wanted, single, index)
        parts = _sublayers(single)
        for paths in parts if sublayers else (sum(parts, ()),):
            read = _gathered(layer, statistics, paths, before.params, read_there)
            for path in read:
                read[path] |= first.get(layer.path(path), {})
            layer, one = fn(layer, read)
            found.append(one)
        params[name], (blocks[index],) = layer.params, layer.config.blocks
        packed |= {f"{name}/{p}": (mask.shape[-1], jnp.packbits(mask, axis=-1)) for p, mask in layer.masks.items()}
        same = same and layer is before
        if index + 1 < count or output:
            for i, row in enumerate(chunks):  # in place: of two lists only one fits beside a large model
                x = wanted[i] if same else jax.block_until_ready(layer(layer.params, *row))
                chunks[i] = (x, *row[1:])
        malloc.trim()
    if output:
        own = {name: params[name] for name in ("final_norm", "embedding" if model.config.tied else "unembedding")}
        layer = Layer(own, {}, chunks, wanted, model.config, None)
        layer, one = fn(layer, _gathered(layer, statistics, tuple(own)[1:], own, wanted if "pairs" in kinds else []))
        params |= layer.params
        found.append(one)
    del chunks, wanted, layer, before
    masks |= {p: jnp.unpackbits(mask, axis=-1, count=size).astype(bool) for p, (size, mask) in packed.items()}
    config = dataclasses.replace(model.config, blocks=tuple(blocks))
    return model.replace(config=config, params=params, masks=masks or None), found


def _sublayers(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The kernels of SUBLAYERS, in place of the feed-forward part's those of all experts beside each other."""
    (block,) = config.blocks
    own = lambda name: [name.replace("feedforward/", f"feedforward/expert_{e}/") for e in range(block.experts)]
    named = lambda name: own(name) if block.experts and name.startswith("feedforward/") else [name]
    return tuple(tuple(f"{each}/kernel" for name in names for each in named(name)) for names in SUBLAYERS)


def _gathered(
    layer: Layer,
    statistics: Mapping[str, Statistic],
    paths: tuple[str, ...],
    original: Any,
    read_there: list[jax.Array],
) -> States:
    """{path: {name: state}} of these matrices over all rows of a layer. read_there: with pairs, what the layer
    reads in the model as it was, where its weights are `original`."""
    if not statistics:
        return {}
    made = tuple((name, one) for name, one in statistics.items() if one.of != "gradients")
    states, found = None, {}
    for i, row in enumerate(layer.rows):
        there = (original, read_there[i]) if read_there else None
        # One program at a time: several at once, each of which waits for all devices, can wait for each other.
        states = jax.block_until_ready(_update(layer.config, made, paths, layer.params, states, there, *row))
    for (name, together), state in states.items():
        for path in together.split(" "):
            found.setdefault(path, {})[name] = state
    return found


def gradients(
    model: LanguageModel,
    rows: Mapping[str, Any],
    statistics: Mapping[str, Statistic],
    mesh: Mesh,
    chosen: Callable[[str], bool] = in_layer,
    title: str = "gradients",
) -> States:
    """{path in the model: {name: state}} of the statistics of gradients, of the chosen matrices.

    A row is read at a time, forward and backward; beside the weights in float32 there are the activations of that row,
    the gradients of the chosen matrices and the states.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(ops.in_float32, model.params, is_leaf=trees.is_leaf)
    params = jax.device_put(params, placement.shardings(params, mesh))
    shapes = {path: w.shape for path, w in trees.flatten(params) if chosen(path)}
    made = tuple((name, one) for name, one in statistics.items() if one.of == "gradients")
    states = {path: {name: one.init(path, shape) for name, one in made} for path, shape in shapes.items()}
    fields = {name: np.asarray(rows[name], np.int32) for name in ("inputs", "targets", "positions", "segments")}
    count = len(fields["inputs"])
    for index in progress.shown(range(count), f"{title}: rows", count):
        row = jax.device_put({name: field[index : index + 1] for name, field in fields.items()}, whole)
        states = jax.block_until_ready(_of_row(model.config, made, params, states, row))
    return states


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _of_row(
    config: ModelConfig, made: tuple[tuple[str, Statistic], ...], params: Any, states: States, row: dict[str, jax.Array]
) -> States:
    matrices = {path: w for path, w in trees.flatten(params) if path in states}

    def loss(matrices: dict[str, jax.Array]) -> jax.Array:
        weights = trees.map_with_path(lambda path, w: matrices.get(path, w), params)
        mean, parts = language_model_loss(config)(weights, {}, row, None)
        return mean * parts["weight"]

    with sharding.mesh_of(row):
        found = jax.grad(loss)(matrices)
    return {
        path: {name: one.update(states[path][name], w, found[path]) for name, one in made}
        for path, w in matrices.items()
    }


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
def layer_output(config: ModelConfig, params: Any, *row: jax.Array) -> jax.Array:
    """The output [n, T, D] of the layer of a `layerwise.block_config`, for one chunk of rows."""
    with sharding.mesh_of(row):
        return layerwise.apply_block(config, params, *row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _update(
    config: ModelConfig,
    made: tuple[tuple[str, Statistic], ...],
    paths: tuple[str, ...],
    params: Any,
    states: Any,
    there: tuple[Any, jax.Array] | None,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
) -> dict[tuple[str, str], Any]:
    """{(name, paths that share the state, joined by spaces): state}, after one more chunk."""
    counted, weights = (segments > 0).reshape(-1, 1), dict(trees.flatten(params))
    flat = lambda x: jnp.where(counted, x.reshape(counted.size, -1).astype(jnp.float32), 0.0)
    same: dict[int, list[str]] = {}
    seen: dict[tuple[str, str], tuple[jax.Array, ...]] = {}
    with sharding.mesh_of(x):
        read = _reads(config, params, x, positions, segments)
        read_there = _reads(config, *there, positions, segments) if there else read
        for path in paths:
            if path in read:
                same.setdefault(id(read[path]), []).append(path)
                if any(one.of == "outputs" for _, one in made):
                    seen["outputs", path] = (flat(ops.dot(read[path], weights[path])),)
    for each in same.values():
        seen["inputs", " ".join(each)] = (flat(read[each[0]]),)
        seen["pairs", " ".join(each)] = (flat(read[each[0]]), flat(read_there[each[0]]))
    after = {}
    for name, one in made:
        for (of, together), arrays in seen.items():
            if of == one.of:
                state = states[name, together] if states else one.init(arrays[0].shape[1])
                after[name, together] = one.update(state, *arrays, counted)
    return after


def _reads(config: ModelConfig, params: Any, x: jax.Array, *row: jax.Array) -> dict[str, jax.Array]:
    """{path of a matrix of a Layer: what it reads}."""
    if "final_norm" in params:
        return dict.fromkeys(params.keys() - {"final_norm"}, layerwise.final_states(config, params, x))
    return layerwise.reads(config, params, x, *row)
