"""How much worse a model becomes when one matrix alone is rounded, at each format: which matrices need their bits.

Measured, all other matrices as they are: the increase of the mean next-token loss, and the divergence of the outputs
from those of the whole model (Cai 2020, arXiv 2001.00281, section 3.2). The divergence is the increase that is expected
if the text is what the model expects; it is never negative and varies far less from text to text. Estimated, without
running the rest of the model: the mean squared error of what the matrix gives, tr(E^T G E) / tokens, for its error E
and G = X^T X of what it reads.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.cli import progress
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer, States
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise
from efflm.ops import Format, QArray
from efflm.parallel import sharding
from efflm.train import losses

Unit = Literal["matrix", "input", "layer"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One unit in one format. paths: its matrices. loss: the increase of the mean loss, and divergence: the mean KL
    divergence of the outputs from the model's, in nats a token; None where they were not measured. estimate: the mean
    squared error of what its matrices give, summed over outputs. bytes: what they take in the format, as a file holds
    them; saved: how many fewer that is than they take as they are."""

    name: str
    paths: tuple[str, ...]
    format: Format
    loss: float | None
    divergence: float | None
    estimate: float
    bytes: int
    saved: int

    @property
    def bits(self) -> float | None:
        """The increase of the loss in bits a token."""
        return None if self.loss is None else self.loss / math.log(2)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, unit by unit and format by format. loss: of the model as it is, in nats a token, over so many tokens."""

    loss: float
    tokens: int
    rows: tuple[Row, ...]

    @property
    def units(self) -> dict[str, tuple[Row, ...]]:
        """The rows of each unit."""
        names = dict.fromkeys(row.name for row in self.rows)
        return {name: tuple(row for row in self.rows if row.name == name) for name in names}


def sensitivity(
    model: LanguageModel, batch: Mapping[str, Any] | None, formats: Sequence[Format], mesh: Mesh, *,
    rows: int = 16, unit: Unit = "matrix",
) -> Table:  # fmt: skip
    """What it costs to round one unit alone, over the first `rows` rows of a batch (data.packing).

    unit: each matrix of the layers, those that read the same, or each layer. A layer's inputs are computed once, and
    only what comes after them is run again. Weights that are quantized already stay as they are, but their activations
    are not rounded. Raises InputError.
    """
    model, batch = _floats(model), _first(batch, rows)
    fields = calibrate.chunks(batch, ("targets", "segments"), mesh)
    count, outer = _tokens(batch), _outer(model.params)

    def states(index: int, params: Any, x: jax.Array, *row: jax.Array) -> jax.Array:
        """The final states for what layer `index` reads, its weights being `params`."""
        for later in range(index, len(model.config.blocks)):
            own = params if later == index else model.params[f"block_{later}"]
            x = calibrate.layer_output(layerwise.block_config(model.config, later), own, x, *row)
        return _final_states(model.config, outer, x)

    whole = [states(0, model.params["block_0"], *row) for row in calibrate.inputs(model, batch, mesh)]

    def means(final: Iterable[jax.Array]) -> tuple[float, float]:
        """The mean loss, and the mean divergence."""
        sums = [_sums(model.config, outer, *each, *own) for *each, own in zip(final, whole, fields, strict=True)]
        return tuple(sum(float(each[i]) for each in sums) / count for i in range(2))

    base, _ = means(whole)

    def measure(layer: Layer, made: Mapping[str, QArray]) -> tuple[float, float]:
        params = _with(layer.params, made)
        loss, divergence = means(states(layer.index, params, *row) for row in layer.rows)
        return loss - base, divergence

    found = estimated(model, batch, formats, mesh, rows=rows, unit=unit, measure=measure)
    return dataclasses.replace(found, loss=base)


def estimated(
    model: LanguageModel, batch: Mapping[str, Any] | None, formats: Sequence[Format], mesh: Mesh, *,
    rows: int = 16, unit: Unit = "matrix",
    measure: Callable[[Layer, Mapping[str, QArray]], tuple[float | None, float | None]] = lambda *given: (None, None),
) -> Table:  # fmt: skip
    """The same with the estimates alone: one pass over the rows. The loss of the model is not known (NaN).

    measure: of a layer of which these weights are rounded, the increase of the loss and the divergence.
    """
    require(len(formats) > 0, "there is no format to try: give one at least")
    model, batch = _floats(model), _first(batch, rows)
    sizes, tokens = _work(model), _tokens(batch)
    with progress.bar("sensitivity: matrices", sum(sizes)) as update:

        def one(layer: Layer, read: States) -> tuple[Layer, list[Row]]:
            found, units = [], _units(layer, read, unit)
            tried = list(itertools.product(units.items(), formats))
            for count, ((name, paths), format) in enumerate(tried, 1):
                own = {path: w for path, w in trees.flatten(layer.params) if path in paths}
                made = {path: ops.quantize_array(w, -2, format) for path, w in own.items()}
                squared = sum(float(_squared(own[path], w, read[path]["gram"])) for path, w in made.items())
                nbytes = ops.stored_nbytes(made, layer.masks)
                saved = ops.stored_nbytes(own, layer.masks) - nbytes
                whole = tuple(f"block_{layer.index}/{path}" for path in made)
                found.append(Row(name, whole, format, *measure(layer, made), squared / tokens, nbytes, saved))
                update(sum(sizes[: layer.index]) + sizes[layer.index] * count / len(tried))
            return layer, found

        _, found = calibrate.walk(model, batch, one, {"gram": calibrate.GRAM}, mesh=mesh, title=None)
    return Table(math.nan, tokens, tuple(itertools.chain.from_iterable(found)))


def _units(layer: Layer, read: States, unit: Unit) -> dict[str, tuple[str, ...]]:
    """{name: paths in the layer} of what is rounded together."""
    together: dict[Any, list[str]] = {}
    for path, states in sorted(read.items()):
        together.setdefault({"matrix": path, "input": id(states["gram"]), "layer": 0}[unit], []).append(path)
    block, short = f"block_{layer.index}", lambda path: path.removesuffix("/kernel")
    names = [block if unit == "layer" else f"{block}/{'+'.join(map(short, paths))}" for paths in together.values()]
    return dict(zip(names, map(tuple, together.values()), strict=True))


@jax.jit
def _squared(w: jax.Array, rounded: QArray, gram: jax.Array) -> jax.Array:
    """tr(E^T G E), E the error of the rounded matrix."""
    error = ops.in_float32(rounded) - ops.in_float32(w)
    return jnp.sum(error * jnp.matmul(gram, error, precision="highest"))


@functools.partial(jax.jit, static_argnums=0)
def _final_states(config: ModelConfig, params: Any, x: jax.Array) -> jax.Array:
    with sharding.mesh_of(x):
        return layerwise.final_states(config, params, x)


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: ModelConfig, params: Any, x: jax.Array, whole: jax.Array, targets: jax.Array, segments: jax.Array):
    """The loss and the divergence, summed over the targets."""
    with sharding.mesh_of(x):
        return losses.sums_against(config, params, x, whole, {"targets": targets, "segments": segments})[:2]


def _outer(params: Any) -> dict[str, Any]:
    """The weights outside the layers."""
    return {name: leaf for name, leaf in params.items() if not name.startswith("block_")}


def _with(params: Any, made: Mapping[str, QArray]) -> Any:
    """The weights of a layer with these in place of their own, as floats: so every format runs the same program."""
    return trees.map_with_path(lambda path, w: ops.dequantize(made[path]) if path in made else w, params)


def _floats(model: LanguageModel) -> LanguageModel:
    return model.replace(params=jax.tree.map(ops.dequantize, model.params, is_leaf=trees.is_leaf))


def _first(batch: Mapping[str, Any] | None, rows: int) -> dict[str, Any]:
    require(batch is not None, "sensitivity needs calibration text: give a corpus")
    require(rows > 0, f"rows is {rows}, but must be positive")
    return {name: field[:rows] for name, field in batch.items()}


def _tokens(batch: Mapping[str, Any]) -> int:
    count = int(np.sum(np.asarray(batch["segments"]) > 0))
    require(count > 0, "the calibration text holds no tokens, only padding: give another corpus")
    return count


def _work(model: LanguageModel) -> list[float]:
    """For each layer, the weights that run again when it changes: its own, those after it and the output layer's."""
    counts = [trees.count(model.params[f"block_{index}"]) for index in range(len(model.config.blocks))]
    return [float(sum(counts[index:]) + model.config.vocabulary * model.config.width) for index in range(len(counts))]
