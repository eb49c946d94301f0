"""How much worse a model becomes when one matrix alone is rounded, at each format: which matrices need their bits.

Predicted, from one backward pass over the text: the divergence of the outputs from those of the whole model, by the
diagonal of the Fisher information (compress.fisher). Measured, all other matrices as they are: the increase of the mean
next-token loss, and that divergence (Cai 2020, arXiv 2001.00281, section 3.2). The divergence is the increase that is
expected if the text is what the model expects; it is never negative and varies far less from text to text.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.cli import progress
from efflm.compress import calibrate, fisher
from efflm.compress.calibrate import Layer
from efflm.compress.plan import TABLES, counted, grid_for, unseen
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise
from efflm.model.params import find, in_layer, is_matrix
from efflm.ops import Format, QArray, qarray
from efflm.ops.grid import Grid
from efflm.ops.masks import Masks
from efflm.parallel import sharding
from efflm.train import losses

Unit = Literal["matrix", "input", "layer"]
SAMPLED = 4  # of so many outputs of a matrix of a layer one is rounded to predict what rounding it costs


@dataclasses.dataclass(frozen=True)
class Row:
    """One unit in one format. paths: its matrices. loss: the increase of the mean loss, and divergence: the mean KL
    divergence of the outputs from the model's, in nats a token; None where they were not measured. predicted: that
    divergence by the Fisher information. bytes: what they take in the format, as a file holds them; saved: how many
    fewer that is than they take as they are."""

    name: str
    paths: tuple[str, ...]
    format: Format
    loss: float | None
    divergence: float | None
    predicted: float
    bytes: int
    saved: int

    @property
    def bits(self) -> float | None:
        """The increase of the loss in bits a token."""
        return None if self.loss is None else self.loss / math.log(2)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, unit by unit and format by format. loss: of the model as it is, in nats a token, over so many tokens; NaN
    where it was not measured."""

    loss: float
    tokens: int
    rows: tuple[Row, ...]

    @property
    def units(self) -> dict[str, tuple[Row, ...]]:
        """The rows of each unit."""
        names = dict.fromkeys(row.name for row in self.rows)
        return {name: tuple(row for row in self.rows if row.name == name) for name in names}


def predicted(
    model: LanguageModel, batch: Mapping[str, Any] | None, formats: Sequence[Format], mesh: Mesh, *,
    rows: int = 16, unit: Unit = "matrix", seed: int = 0,
) -> Table:  # fmt: skip
    """What it costs to round one unit alone, by the Fisher information over the first `rows` rows of a batch
    (data.packing), whose targets are drawn with the seed.

    unit: each matrix, those of the layers that read the same, or each layer; embeddings and an output layer of its own
    are units, a tied one once. Raises InputError.
    """
    require(len(formats) > 0, "there is no format to try: give one at least")
    model, batch, counts = _floats(model), *_first(batch, rows, model.config)
    tokens, information = _tokens(batch), fisher.diagonal(model, batch, mesh, seed)
    # A token that these rows do not have costs what those cost that they have once, where it is there.
    read = counted(batch, model.config.vocabulary)
    for path in information.keys() & set(TABLES) if np.any(read == 1) else ():
        axis = 0 if path == "embedding" else 1
        once = jnp.compress(read == 1, information[path], axis)
        information[path] += unseen(read) * jnp.mean(once, axis, keepdims=True)
    weights, found, units = dict(trees.flatten(model.params)), [], _units(model, unit)
    for name in progress.shown(units, "rounding: matrices", len(units)):
        own = {path: weights[path] for path in units[name]}
        before = ops.stored_nbytes(own, model.masks, any(format.is_coded for format in formats))
        for format in formats:
            how = format, model.masks or {}, counts
            each = [_predicted(path, information[path], w, *how) for path, w in own.items()]
            cost, nbytes = (sum(part) for part in zip(*each))
            found.append(Row(name, units[name], format, None, None, cost, nbytes, before - nbytes))
    return Table(math.nan, tokens, tuple(found))


def sensitivity(
    model: LanguageModel, batch: Mapping[str, Any] | None, formats: Sequence[Format], mesh: Mesh, *,
    rows: int = 16, unit: Unit = "matrix", seed: int = 0,
) -> Table:  # fmt: skip
    """The same, and measured: one unit after another is rounded, and what comes after it is run again.

    Weights that are quantized already stay as they are, but their activations are not rounded. Raises InputError.
    """
    table = predicted(model, batch, formats, mesh, rows=rows, unit=unit, seed=seed)
    model, batch, counts = _floats(model), *_first(batch, rows, model.config)
    fields, count = calibrate.chunks(batch, ("targets", "segments"), mesh), len(model.config.blocks)

    def final_states(params: Any, index: int, reads: Iterable[tuple[jax.Array, ...]]) -> Iterator[jax.Array]:
        """For what layer `index` reads."""
        for x, *row in reads:
            for later in range(index, count):
                x = calibrate.layer_output(
                    layerwise.block_config(model.config, later), params[f"block_{later}"], x, *row
                )
            yield _final_states(model.config, _outer(params), x)

    def means(params: Any, final: Iterable[jax.Array]) -> tuple[float, float]:
        """The mean loss, and the mean divergence."""
        outer = _outer(params), _outer(model.params)
        sums = [_sums(model.config, *outer, *each, *own) for *each, own in zip(final, whole, fields, strict=True)]
        return tuple(sum(float(each[i]) for each in sums) / table.tokens for i in range(2))

    whole = list(final_states(model.params, 0, calibrate.inputs(model, batch, mesh)))
    base, _ = means(model.params, whole)
    with progress.bar("sensitivity: matrices", sum(_work(model, row) for row in table.rows)) as update:
        done = 0.0

        def measured(row: Row, index: int, reads: Iterable[tuple[jax.Array, ...]] | None) -> Row:
            """reads: of layer `index`; None: what it reads changes too."""
            nonlocal done
            grid = lambda path, w: grid_for(path, w, row.format, counts)
            rounded = lambda path, w: ops.quantize_array(w, find(path)[0].contracted, row.format, grid(path, w))
            made = {
                path: ops.dequantize(rounded(path, w)) for path, w in trees.flatten(model.params) if path in row.paths
            }
            after = model.replace(params=trees.map_with_path(lambda path, w: made.get(path, w), model.params))
            reads = calibrate.inputs(after, batch, mesh) if reads is None else reads
            loss, divergence = means(after.params, final_states(after.params, index, reads))
            done += _work(model, row)
            update(done)
            return dataclasses.replace(row, loss=loss - base, divergence=divergence)

        def one(layer: Layer, _: Any) -> tuple[Layer, list[Row]]:
            own = [row for row in table.rows if row.paths[0].startswith(layer.path(""))]
            return layer, [measured(row, layer.index, layer.rows) for row in own]

        _, found = calibrate.walk(model, batch, one, mesh=mesh, title=None)
        found.append([measured(row, 0, None) for row in table.rows if not in_layer(row.paths[0])])
    return Table(base, table.tokens, tuple(itertools.chain.from_iterable(found)))


def _units(model: LanguageModel, unit: Unit) -> dict[str, tuple[str, ...]]:
    """{name: paths} of what is rounded together: layer by layer, and then what is outside the layers."""
    out = {}
    for index in range(len(model.config.blocks)):
        together: dict[Any, list[str]] = {}
        for path, _ in trees.flatten(model.params[f"block_{index}"]):
            if in_layer(f"block_{index}/{path}"):
                part, _, name = path.removesuffix("/kernel").rpartition("/")
                together.setdefault({"matrix": path, "input": (part, _READS[name]), "layer": 0}[unit], []).append(path)
        for paths in together.values():
            short = "+".join(path.removesuffix("/kernel") for path in paths)
            name = f"block_{index}" if unit == "layer" else f"block_{index}/{short}"
            out[name] = tuple(f"block_{index}/{path}" for path in paths)
    return out | {path: (path,) for path in _outer(model.params) if is_matrix(path)}


_READS = {path.rpartition("/")[2]: i for i, together in enumerate(calibrate.SUBLAYERS) for path in together}


def _predicted(
    path: str,
    information: jax.Array,
    w: jax.Array,
    format: Format,
    masks: Masks,
    counts: np.ndarray | None,
) -> tuple[float, int]:
    """The divergence, and the bytes. counts: of tokens.

    Of a large matrix of a layer by every fourth output, whose ranges are not searched from 4 bits on: the error is then
    a tenth larger. Its bytes are those of dense codes, unless a mask says how many are zero, or of entropy-coded ones.
    Tables of tokens are rounded whole: few tokens have most of the information, and the many zeros of some are stored
    as bits.
    """
    axis, step = find(path)[0].contracted, SAMPLED if in_layer(path) and w.shape[-1] >= 64 * SAMPLED else 1
    part, own = (x[..., ::step] for x in (w, information))
    tried = dataclasses.replace(format, clip=format.clip and (step == 1 or format.bits < 4))
    grid = grid_for(path, part, tried, counts)
    if in_layer(path) and not format.is_coded:
        cost = _cost(own, part, grid, jnp.float32(format.low), axis, format.group_in(w.shape[axis]))
        stored = _shapes(w.shape, str(w.dtype), axis, format)
        return step * float(cost), ops.stored_nbytes({path: stored}, masks) if path in masks else trees.nbytes(stored)
    kept = {path: masks[path][..., ::step]} if path in masks else {}
    rounded = ops.quantize_array(part, axis, format, grid)
    return step * float(_divergence(own, part, rounded)), step * ops.stored_nbytes({path: rounded}, kept)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _cost(information: jax.Array, w: jax.Array, grid: Grid, low: jax.Array, axis: int, group: int) -> jax.Array:
    """The divergence where w has codes from `low` on of a grid: one program for all bits."""
    lost = qarray.nearest_on_grid(w, grid, axis, group, low) - w
    return jnp.sum(information * jnp.square(lost)) / 2


@functools.cache
def _shapes(shape: tuple[int, ...], dtype: str, axis: int, format: Format) -> Any:
    """A matrix in a format, without its numbers."""
    stored = dataclasses.replace(format, scale_dtype=format.scale_dtype or "float16")  # bfloat16 takes as many bytes
    rounded = functools.partial(ops.quantize_array, axis=axis, format=stored)
    return jax.eval_shape(rounded, jax.ShapeDtypeStruct(shape, dtype))


@jax.jit
def _divergence(information: jax.Array, w: jax.Array, rounded: QArray) -> jax.Array:
    return jnp.sum(information * jnp.square(ops.in_float32(rounded) - ops.in_float32(w))) / 2


@functools.partial(jax.jit, static_argnums=0)
def _final_states(config: ModelConfig, params: Any, x: jax.Array) -> jax.Array:
    with sharding.mesh_of(x):
        return layerwise.final_states(config, params, x)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    config: ModelConfig, params: Any, whole_params: Any, x: jax.Array, whole: jax.Array, targets: Any, segments: Any
) -> tuple[jax.Array, jax.Array]:
    """The loss and the divergence, summed over the targets."""
    with sharding.mesh_of(x):
        batch = {"targets": targets, "segments": segments}
        return losses.sums_against(config, (params, x), (whole_params, whole), batch)[:2]


def _outer(params: Any) -> dict[str, Any]:
    """The weights outside the layers."""
    return {name: leaf for name, leaf in params.items() if not name.startswith("block_")}


def _floats(model: LanguageModel) -> LanguageModel:
    return model.replace(params=jax.tree.map(ops.dequantize, model.params, is_leaf=trees.is_leaf))


def _first(batch: Mapping[str, Any] | None, rows: int, config: ModelConfig) -> tuple[dict[str, Any], np.ndarray]:
    """The first rows, and how often all of them have each token."""
    require(batch is not None, "sensitivity needs calibration text: give a corpus")
    require(rows > 0, f"rows is {rows}, but must be positive")
    return {name: field[:rows] for name, field in batch.items()}, counted(batch, config.vocabulary)


def _tokens(batch: Mapping[str, Any]) -> int:
    count = int(np.sum(np.asarray(batch["segments"]) > 0))
    require(count > 0, "the calibration text holds no tokens, only padding: give another corpus")
    return count


def _work(model: LanguageModel, row: Row) -> float:
    """The weights that run again for a row: of its layer, of those after it and of the output layer."""
    counts = [trees.count(model.params[f"block_{index}"]) for index in range(len(model.config.blocks))]
    block = row.paths[0].partition("/")[0].removeprefix("block_")
    return float(sum(counts[int(block) if block.isdigit() else 0 :]) + model.config.vocabulary * model.config.width)
