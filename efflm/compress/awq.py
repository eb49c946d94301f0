"""AWQ (Lin 2023, arXiv 2306.00978): before rounding, weights that read large activations are scaled up, so that they
lose less of themselves, and their inputs down. What the model computes changes by the rounding alone."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import calibrate, fold
from efflm.compress.calibrate import Layer
from efflm.compress.plan import Plan, Rounder, nearest, plan_of, require_formats
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.config.model import ModelConfig
from efflm.model import LanguageModel, layerwise
from efflm.ops import Format
from efflm.ops.grid import by_entry, grouped
from efflm.parallel import sharding

ROWS = 16  # on so many rows of the text candidates are compared by running a part of the layer
STATISTICS = {"magnitudes": calibrate.MAGNITUDES, "tokens": calibrate.TOKENS, "gram": calibrate.GRAM}


def weight_means(matrices: list[tuple[jax.Array, Format]]) -> jax.Array:
    """Of each input [K], the mean over outputs of all matrices [K, N] of |w| / the largest |w| of its group."""

    def shares(w: jax.Array, format: Format) -> jax.Array:
        group = format.group_in(w.shape[0])
        most = jnp.max(jnp.abs(grouped(w, 0, group)), axis=1)
        return jnp.abs(w) / jnp.maximum(by_entry(most, 0, group, w.shape[0]), 1e-12)

    return jnp.mean(jnp.concatenate([shares(*each) for each in matrices], axis=1), axis=1)


def candidates(x_mean: jax.Array, w_mean: jax.Array, grid: int) -> Iterator[jax.Array]:
    """No scaling, and s = x_mean^a / w_mean^(1 - a) for each input [K], for `grid` values of a from 0 on; each divided
    by the geometric mean of its least and greatest."""
    yield jnp.ones_like(x_mean)
    x, w = (jnp.maximum(mean, 1e-4 * jnp.max(mean)) for mean in (x_mean, w_mean))
    if jnp.max(x_mean) > 0 and jnp.max(w_mean) > 0:
        for step in range(grid):
            s = jnp.power(x, step / grid) / jnp.power(w, 1 - step / grid)
            yield s / jnp.sqrt(jnp.max(s) * jnp.min(s))


def scaled_and_rounded(w: jax.Array, s: jax.Array, squares: jax.Array, format: Format) -> jax.Array:
    """w [K, N] as a model has it whose rounded matrix is s w, and which divides what the matrix reads by s [K].

    squares: of each input [K] before that, the sum of its squares, which the search of ranges weighs errors by.
    """
    return ops.dequantize(ops.quantize_array(w * s[:, None], -2, format, importance=squares / s**2)) / s[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def part_output(config: ModelConfig, last: str, params: Any, *row: jax.Array) -> jax.Array:
    """What the part of a layer whose last matrix is `last` gives, float32 [n, T, D]; row: one of Layer.rows."""
    with sharding.mesh_of(row):
        read = layerwise.reads(config, params, *row)[last]
        return ops.dot(read, dict(trees.flatten(params))[last]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def part_error(config: ModelConfig, last: str, params: Any, wanted: jax.Array, *row: jax.Array) -> jax.Array:
    """The squared error of that, summed over the positions that hold text."""
    lost = part_output(config, last, params, *row) - wanted
    return jnp.sum(jnp.where(row[-1][..., None] > 0, jnp.square(lost), 0.0))


@jax.jit
def gram_error(lost: jax.Array, gram: jax.Array) -> jax.Array:
    """The squared error of x W summed over all tokens, where W [K, N] lost this and gram is X^T X."""
    return jnp.sum(lost * jnp.matmul(gram, lost, precision="highest"))


def best_scales(layer: Layer, place: fold.Place, formats: dict[str, Format], read: dict[str, Any], grid: int):
    """Of the candidates the scales [K] of what a place reads with which its part of the layer loses least.

    formats: of those of its readers that are rounded, by their paths in the layer; read: the statistics of what they
    read. A part whose only reader is its last matrix is linear in that, so that X^T X says what it loses.
    """
    weights, squares = dict(trees.flatten(layer.params)), jnp.diag(read["gram"])
    matrices = {path: ops.in_float32(weights[path]) for path in formats}
    linear, rows = place.last in formats, layer.rows[: -(-ROWS // len(layer.rows[0][0]))]
    wanted = [] if linear else [part_output(layer.config, place.last, layer.params, *row) for row in rows]

    def error(s: jax.Array) -> float:
        found = {path: scaled_and_rounded(w, s, squares, formats[path]) for path, w in matrices.items()}
        if linear:
            return float(gram_error(found[place.last] - matrices[place.last], read["gram"]))
        changed = trees.unflatten(weights | found)
        each = (part_error(layer.config, place.last, changed, y, *row) for y, row in zip(wanted, rows, strict=True))
        return sum(map(float, each))

    w_mean = weight_means([(w, formats[path]) for path, w in matrices.items()])
    each = candidates(read["magnitudes"] / read["tokens"], w_mean, grid)
    return min((fold.shared(layer.config, place, s) for s in each), key=error)


def scaled(layer: Layer, read: calibrate.States, plan: Plan, grid: int) -> tuple[Layer, dict[str, jax.Array]]:
    """The layer with its inputs scaled, which computes the same as it did; and of what each matrix reads then the sum
    of squares [K]."""
    squares = {path: jnp.diag(states["gram"]) for path, states in read.items()}
    for place in fold.places(layer.config):
        planned = {path: plan.of(layer.path(path)) for path in place.readers}
        formats = {path: format for path, format in planned.items() if format}
        if formats:
            s = best_scales(layer, place, formats, read[place.readers[0]], grid)
            layer = layer.replace(params=fold.scale_inputs(layer.config, layer.params, place, s))
            squares |= {path: squares[path] / s**2 for path in place.readers}
    return layer, squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Rounder):
    """Scale inputs so that rounding costs the attention and the feed-forward part least, and round to the nearest.

    A candidate for what the norms give takes a pass of ROWS rows through the attention part, or through the layer:
    1.5 x grid x ROWS / rows forward passes, 4 with 128 rows. Those for the output and down matrices are compared by
    X^T X. Two more passes gather what is read and make the inputs of the next layer.
    """

    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "choose the range of each scale by the least error, weighted by what inputs do")
    grid: int = flag(20, "exponents that are tried between 0 and 1")

    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, plan_of(self), activations=("float", "int8"))
        require(self.grid > 0, f"grid is {self.grid}, but must be positive")

    def __call__(self, model: LanguageModel, context: Context):
        plan = plan_of(self)

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            layer, squares = scaled(layer, read, plan, self.grid)

            def matrix(path: str, w: Any) -> Any:
                format = plan.of(layer.path(path))
                if path not in read or format is None or isinstance(w, ops.QArray):
                    return w
                return ops.quantize_array(w, -2, format, importance=squares[path])

            return layer.replace(params=trees.map_with_path(matrix, layer.params)), None

        after, _ = calibrate.walk(model, context.calibration, one, STATISTICS, mesh=context.mesh, title="AWQ")
        after = after.replace(params=nearest(after.params, plan))
        return after, record(self, model, after, context)
