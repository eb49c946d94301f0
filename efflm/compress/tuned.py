"""Learned rounding (SignRound, Cheng 2023, arXiv 2309.05516), layer by layer (BRECQ, Li 2021, arXiv 2102.05426).

The nearest code is not the best one for each weight on its own. An offset of every weight, and how much of its range
each group keeps, are trained until the layer with rounded weights computes what the layer did. Where offsets have no
bounds the weights themselves are trained (Block-AP of EfficientQAT, Chen 2024, arXiv 2407.11062).
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efflm import ops, trees
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.plan import Plan, Rounder, nearest, plan_of, require_formats
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import LanguageModel, layerwise, placement
from efflm.ops import Format, qarray
from efflm.ops.grid import Grid, as_stored, by_entry, grid_of
from efflm.parallel import sharding
from efflm.train import trainer
from efflm.train.losses import weighted_mean
from efflm.train.training import Training

LEAST_RANGE, MOST_RANGE = 0.1, 1.2  # of its range, what a group keeps at least and at most
CHECKS = 4  # how often the error on held-out rows is measured in the training of a layer
HELD_OUT = 8  # one of so many chunks of rows is held out, the first ones


# What is learned of how a matrix [K, N] is rounded: offset V [K, N], of the codes, and top [groups, N], what a group
# keeps of the range that it began with, more than 1 where it is widened; where the format is not symmetric that is of
# the part above zero, and bottom of the part below it (equations 2 and 3).
Learned = dict[str, jax.Array]


def start(grid: Grid, shape: tuple[int, ...]) -> Learned:
    """The nearest codes of a grid."""
    scale, zeros = grid
    learned = {"offset": jnp.zeros(shape), "top": jnp.ones(scale.shape)}
    return learned if zeros is None else learned | {"bottom": jnp.ones(scale.shape)}


def moved(grid: Grid, learned: Learned, format: Format) -> Grid:
    """The grid of the learned ranges: scales as they are stored, and zeros, both float32 [groups, N]."""
    (scale, zeros), steps = grid, format.high - format.low
    if zeros is None:
        scale = learned["top"] * scale
    else:
        below = zeros.astype(jnp.float32) - format.low
        top, bottom = learned["top"] * (steps - below), learned["bottom"] * below  # in steps
        scale, zero = scale * (top + bottom) / steps, steps * bottom / (top + bottom) + format.low
        zeros = qarray.with_gradient_of(zero, jnp.round(zero))
    return qarray.with_gradient_of(scale, as_stored(scale, -2, format)), zeros


def rounded(w: jax.Array, grid: Grid, learned: Learned, format: Format) -> jax.Array:
    """The rounded matrix, float32; the gradient goes through the rounding as if it were not there."""
    each = lambda part: by_entry(part, -2, format.group_in(w.shape[-2]), w.shape[-2])
    scale, zeros = moved(grid, learned, format)
    scale, zero = each(scale), 0.0 if zeros is None else each(zeros)
    exact = w / scale + learned["offset"]
    codes = qarray.with_gradient_of(exact, jnp.round(exact)) + zero
    return (jnp.clip(codes, format.low, format.high) - zero) * scale


def stored(w: jax.Array, grid: Grid, kept: jax.Array | None, learned: Learned, format: Format) -> ops.QArray:
    """The matrix with its codes; dropped weights are zero."""
    scale, zeros = moved(grid, learned, format)
    found = masked(rounded(w, grid, learned, format), kept)
    return ops.quantize_array(found, -2, format, (scale, None if zeros is None else zeros.astype(jnp.int8)))


def masked(w: jax.Array, kept: jax.Array | None) -> jax.Array:
    return w if kept is None else jnp.where(kept, w, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockError:
    """A loss: the mean squared error of a layer's outputs, over its elements at the positions that hold text.

    trainable: {"block_0": what is learned for each matrix, under its path}. frozen: {"block_0": the weights, "grids":
    {"block_0": the grid that each matrix began with}}. batch: x and wanted [B, T, D], positions and segments [B, T].
    Equal layers have equal losses, which share a compiled step. formats: of the matrices that are rounded, by their
    paths in the layer.
    """

    config: ModelConfig
    formats: tuple[tuple[str, Format], ...]

    def __call__(self, trainable: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array | None = None):
        del rng
        weights = dict(trees.flatten(frozen["block_0"]))
        for path, format in self.formats:
            grid, learned = (_at(tree["block_0"], path) for tree in (frozen["grids"], trainable))
            weights[path] = rounded(weights[path], grid, learned, format)
        params, rows = trees.unflatten(weights), (batch[name] for name in ("x", "positions", "segments"))
        lost = layerwise.apply_block(self.config, params, *rows).astype(jnp.float32) - batch["wanted"]
        counted = (batch["segments"] > 0).astype(jnp.float32)
        weight = jnp.sum(counted)
        error = weighted_mean(jnp.sum(counted * jnp.mean(jnp.square(lost), axis=-1)), weight)
        return error, {"weight": weight}


def signed_descent(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Steps along the sign of the gradient, by a rate that falls linearly to zero; offsets stay within +-1/2."""
    rate = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate), _bounded(0.5))


def adam(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam, by a rate that falls linearly to zero: of the offsets this one, which have no bounds, of the ranges a tenth
    of it."""
    rule = lambda rate: optax.adam(optax.linear_schedule(rate, 0.0, steps))
    kinds = functools.partial(trees.map_with_path, lambda path, _: "offset" if path.endswith("/offset") else "range")
    rules = {"offset": rule(learning_rate), "range": rule(learning_rate / 10)}
    return optax.chain(optax.partition(rules, kinds), _bounded(jnp.inf))


def _bounded(most: float) -> optax.GradientTransformation:
    """Updates with which offsets stay within +-most, and ranges within their bounds."""

    def within(path: str, update: jax.Array, value: jax.Array) -> jax.Array:
        low, high = (-most, most) if path.endswith("/offset") else (LEAST_RANGE, MOST_RANGE)
        return jnp.clip(value + update, low, high) - value

    return optax.stateless(functools.partial(trees.map_with_path, within))


class Best:
    """Of what was learned, that with the least error so far. Given a Training (a train.training.Callback), it looks for
    a better one CHECKS times, at equal distances and after the last step."""

    def __init__(self, begin: Any, measure: Callable[[Any], float]):
        self.learned, self.error, self._measure = begin, measure(begin), measure

    @contextlib.contextmanager
    def __call__(self, training: Training) -> Iterator[Callable[[], None]]:
        every = -(-training.train.steps // CHECKS)

        def after() -> None:
            if training.step % every == 0 or training.last:
                now = self._measure(training.state.trainable)
                if now < self.error:  # a copy, since the next step is given these buffers
                    self.learned, self.error = jax.tree.map(jnp.copy, training.state.trainable), now

        yield after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned(Rounder):
    """Matrices inside the layers, rounded so that each layer computes what it did; embeddings to the nearest.

    What is wanted of a layer is its output where no layer is rounded; it reads what the rounded layers before it made.
    So it makes up for some of their errors, as in the authors' program. Kept is what had the least error on an eighth
    of the rows, which no step reads: the start (the nearest codes, with the range of the least error weighted by what
    inputs do), or what was learned at one of CHECKS checks.

    weights: offsets have no bounds, so that weights, scales and zeros are trained, by Adam in place of steps along the
    sign of the gradient. It needs more text than rounding does: in 2 bits the first layer of stories15M had 11% more
    error on held-out rows with 4 thousand tokens of text, and as much with 25 thousand.

    All steps read steps * batch / rows times the calibration text: 3 times with the defaults and 128 rows. A step is a
    forward and a backward pass of a layer, the work of 3 forward passes or more: 9 in all. Four more make the outputs
    that are wanted, the statistics, the errors at the start and at the checks, and the inputs of the next layer. The
    authors' best setting is the recipe tuned4_best with 512 rows of 2048 tokens, which it reads 16 times: 51 passes.
    """

    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    weights: bool = flag(False, "train the weights too, and not their rounding alone: for 2 bits and much text")
    steps: int = flag(96, "optimizer steps for each layer")
    learning_rate: float = flag(0.0, "of the offsets at the start, in codes; 0: 1 / steps, or 0.05 with weights")
    batch: int = flag(4, "sequences in a step")

    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, self._plan, activations=("float", "int8"), scales=("output",))
        require(self.steps > 0, f"steps is {self.steps}, but must be positive")
        require(self.batch > 0, f"batch is {self.batch}, but must be positive")
        require(
            self.learning_rate >= 0, f"learning_rate is {self.learning_rate}, but must be positive, or 0: the usual one"
        )

    @property
    def _plan(self) -> Plan:
        return plan_of(self, clip=True)

    def __call__(self, model: LanguageModel, context: Context):
        plan = self._plan
        rate = self.learning_rate or (0.05 if self.weights else 1 / self.steps)
        rule = (adam if self.weights else signed_descent)(self.steps, rate)
        programs: trainer.Programs = {}

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            flat = dict(trees.flatten(layer.params))
            planned = {path: plan.of(layer.path(path)) for path in flat}
            formats = {path: format for path, format in planned.items() if format}
            loss = BlockError(config=layer.config, formats=tuple(formats.items()))
            kept = {path: layer.masks[path] for path in formats if path in layer.masks}
            for path in formats:
                flat[path] = masked(ops.in_float32(flat[path]), kept.get(path))
            grids = {p: grid_of(flat[p], -2, f, read[p]["squares"]) for p, f in formats.items()}
            learned = {path: start(grid, flat[path].shape) for path, grid in grids.items()}
            # Under the name of a layer, by which the trainer shards them.
            begin, frozen, grids = ({"block_0": trees.unflatten(each)} for each in (learned, flat, grids))
            frozen["grids"] = grids
            # Where the trainer puts them: so all errors come from one compiled program.
            begin, frozen = (jax.device_put(tree, placement.shardings(tree, context.mesh)) for tree in (begin, frozen))
            rows = [
                {"x": x, "positions": positions, "segments": segments, "wanted": wanted}
                for (x, positions, segments), wanted in zip(layer.rows, layer.wanted, strict=True)
            ]
            rows = [part for part in rows if jnp.any(part["segments"] > 0)]  # the others have no error
            held = -(-len(rows) // HELD_OUT) if len(rows) > 1 else 0
            best = Best(begin, functools.partial(_error, loss, frozen=frozen, rows=rows[:held] or rows))
            task = trainer.Task(
                train=TrainConfig(steps=self.steps),
                loss_fn=loss,
                start=functools.partial(jax.tree.map, jnp.copy, begin),
                batches=_batches(rows[held:], self.batch, context.mesh.devices.size, context.seed),
                frozen=frozen,
                rule=rule,
                masks=ops.mask_tree(begin, {f"block_0/{path}/offset": mask for path, mask in kept.items()}),
            )
            trainer.fit(task, mesh=context.mesh, title="", programs=programs, watched=(best,))
            for path, format in formats.items():
                grid, learned = (_at(tree["block_0"], path) for tree in (frozen["grids"], best.learned))
                flat[path] = stored(flat[path], grid, kept.get(path), learned, format)
            return layer.replace(params=trees.unflatten(flat)), None

        given = {"mesh": context.mesh, "title": "tuned rounding", "reference": True}
        after, _ = calibrate.walk(model, context.calibration, one, {"squares": calibrate.SQUARES}, **given)
        after = after.replace(params=nearest(after.params, plan, inside=False))
        return after, record(self, model, after, context)


def _at(tree: Any, path: str) -> Any:
    """What is under a path in a tree."""
    return functools.reduce(operator.getitem, path.split("/"), tree)


def _batches(rows: list[dict[str, jax.Array]], batch: int, devices: int, seed: int) -> trainer.Batches:
    """step -> `batch` rows, rounded up to a number that the devices share; each row once in turn, in random orders."""
    pool = {name: [row for part in rows for row in np.asarray(part[name])] for name in rows[0]}  # on a CPU no copies
    with_text = np.flatnonzero([np.any(segments > 0) for segments in pool["segments"]])
    size = -(-batch // devices) * devices

    def at(step: int) -> dict[str, np.ndarray]:
        turns, places = np.divmod(np.arange(step * size, (step + 1) * size), len(with_text))
        orders = {turn: np.random.default_rng((seed, turn)).permutation(with_text) for turn in set(turns.tolist())}
        chosen = np.array([orders[turn][place] for turn, place in zip(turns.tolist(), places.tolist())])
        return {name: np.stack([part[row] for row in chosen]) for name, part in pool.items()}

    return at


def _error(loss: BlockError, learned: Any, *, frozen: Any, rows: list[dict[str, jax.Array]]) -> float:
    """The mean error over these rows."""
    found = [_of_rows(loss, learned, frozen, part) for part in rows]
    total, weight = (sum(float(each[i]) for each in found) for i in range(2))
    return total / max(weight, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _of_rows(loss: BlockError, learned: Any, frozen: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    with sharding.mesh_of(part["x"]):
        error, aux = loss(learned, frozen, part)
    return error * aux["weight"], aux["weight"]
