"""Learned rounding (SignRound, Cheng 2023, arXiv 2309.05516), layer by layer (BRECQ, Li 2021, arXiv 2102.05426).

The nearest code is not the best one for each weight on its own. An offset of every weight, and how much of its range
each group keeps, are trained until the layer with rounded weights computes what the layer did.
"""

import dataclasses
import functools
import operator
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
from efflm.parallel import sharding
from efflm.train import trainer
from efflm.train.losses import weighted_mean

LEAST_RANGE, MOST_RANGE = 0.1, 2.0  # the least and the largest part of its range that a group has


# How a matrix w [K, N] is rounded, differentiably, with what is learned for it: offset V [K, N] in [-1/2, 1/2], of the
# codes; top [groups, N], the part of a group's largest magnitude that is its least code, negative where the other sign
# has it; where the format is not symmetric the part of its largest value that is the largest code, and bottom of its
# smallest (equations 2 and 3).
Learned = dict[str, jax.Array]


def start(w: jax.Array, format: Format) -> Learned:
    """No offset, and the range with the least squared error (see ops.qarray.grid_of) where the format clips."""
    scale, zeros = qarray.grid_of(w, -2, format)
    offset = {"offset": jnp.zeros(w.shape)}
    if format.symmetric:
        return offset | {"top": _within_range(scale / _whole(w, format))}
    bottom, top = _ends(w, format)
    part = lambda codes, end: _within_range(jnp.where(end > 0, codes * scale / jnp.where(end > 0, end, 1.0), 1.0))
    return offset | {"top": part(format.high - zeros, top), "bottom": part(zeros - format.low, -bottom)}


def _whole(w: jax.Array, format: Format) -> jax.Array:
    """The scales [groups, N] of a symmetric grid for the whole range."""
    return qarray.grid_of(w, -2, dataclasses.replace(format, clip=False))[0]


def _ends(w: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """The smallest value of each group, at most 0, and the largest, at least 0: [groups, N]."""
    split = qarray.grouped(w, -2, format.group_in(w.shape[-2]))
    return jnp.minimum(jnp.min(split, axis=-2), 0.0), jnp.maximum(jnp.max(split, axis=-2), 0.0)


def _within_range(part: jax.Array) -> jax.Array:
    return jnp.sign(part) * jnp.clip(jnp.abs(part), LEAST_RANGE, MOST_RANGE)


def grid(w: jax.Array, learned: Learned, format: Format) -> qarray.Grid:
    """Scales and zeros [groups, N], float32."""
    if format.symmetric:
        return learned["top"] * _whole(w, format), None
    bottom, top = _ends(w, format)
    top, bottom = learned["top"] * top, learned["bottom"] * bottom
    scale = qarray.symmetric_scale(top - bottom, format.high - format.low)
    zero = qarray.with_gradient_of(-bottom / scale, jnp.round(-bottom / scale))
    return scale, jnp.clip(zero + format.low, format.low, format.high)


def rounded(w: jax.Array, learned: Learned, format: Format) -> jax.Array:
    """The rounded matrix, float32; the gradient goes through the rounding as if it were not there."""
    each = lambda part: qarray.by_entry(part, -2, format.group_in(w.shape[-2]), w.shape[-2])
    scale, zeros = grid(w, learned, format)
    scale, zero = each(scale), 0.0 if zeros is None else each(zeros)
    exact = w / scale + learned["offset"]
    codes = qarray.with_gradient_of(exact, jnp.round(exact)) + zero
    return (jnp.clip(codes, format.low, format.high) - zero) * scale


def stored(w: jax.Array, kept: jax.Array | None, learned: Learned, format: Format) -> ops.QArray:
    """The matrix with its codes; dropped weights are zero."""
    scale, zeros = grid(w, learned, format)
    found = masked(rounded(w, learned, format), kept)
    return ops.quantize_array(found, -2, format, grid=(scale, None if zeros is None else zeros.astype(jnp.int8)))


def masked(w: jax.Array, kept: jax.Array | None) -> jax.Array:
    return w if kept is None else jnp.where(kept, w, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockError:
    """A loss: the mean squared error of a layer's outputs, over its elements at the positions that hold text.

    trainable: {"block_0": what is learned for each matrix, under its path}. frozen: {"block_0": the weights}; zero ones
    stay zero, as |V| <= 1/2. batch: x and wanted [B, T, D], positions and segments [B, T]. Equal layers have equal
    losses, which share a compiled step. formats: of the matrices that are rounded, by their paths in the layer.
    """

    config: ModelConfig
    formats: tuple[tuple[str, Format], ...]

    def __call__(self, trainable: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array | None = None):
        del rng
        weights = dict(trees.flatten(frozen["block_0"]))
        for path, format in self.formats:
            weights[path] = rounded(weights[path], _at(trainable["block_0"], path), format)
        params, rows = trees.unflatten(weights), (batch[name] for name in ("x", "positions", "segments"))
        lost = layerwise.apply_block(self.config, params, *rows).astype(jnp.float32) - batch["wanted"]
        counted = (batch["segments"] > 0).astype(jnp.float32)
        weight = jnp.sum(counted)
        error = weighted_mean(jnp.sum(counted * jnp.mean(jnp.square(lost), axis=-1)), weight)
        return error, {"weight": weight}


def signed_descent(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Steps along the sign of the gradient, by a rate that falls linearly to zero, within the bounds of `Rounding`."""
    rate = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate), optax.stateless(_within))


def _within(updates: Any, params: Any) -> Any:
    def one(path: str, update: jax.Array, value: jax.Array) -> jax.Array:
        if path.endswith("/offset"):
            return jnp.clip(value + update, -0.5, 0.5) - value
        sign = jnp.sign(value)
        return sign * jnp.clip(sign * (value + update), LEAST_RANGE, MOST_RANGE) - value

    return trees.map_with_path(one, updates, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned(Rounder):
    """Matrices inside the layers, rounded so that each layer computes what it did; embeddings to the nearest.

    What is wanted of a layer is its output where no layer is rounded; it reads what the rounded layers before it made.
    So it makes up for some of their errors, as in the authors' program. What was learned is kept if its error over all
    rows is less than that of the start: the nearest codes, with the range of the least squared error.

    All steps read steps * batch / rows times the calibration text: 3 times with the defaults and 128 rows. A step is a
    forward and a backward pass of a layer, the work of 3 forward passes or more: 9 in all. Four more make the outputs
    that are wanted, the errors before and after, and the inputs of the next layer.
    """

    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    steps: int = flag(96, "optimizer steps for each layer")
    learning_rate: float = flag(0.0, "of the offsets at the start, in codes; 0: 1 / steps")
    batch: int = flag(4, "sequences in a step")

    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        require_formats(self, self._plan, activations=("float", "int8"), scales=("output",), scale_dtype=("",))
        require(self.steps > 0, f"steps is {self.steps}, but must be positive")
        require(self.batch > 0, f"batch is {self.batch}, but must be positive")
        require(
            self.learning_rate >= 0, f"learning_rate is {self.learning_rate}, but must be positive, or 0: 1 / steps"
        )

    @property
    def _plan(self) -> Plan:
        return plan_of(self, clip=True)

    def __call__(self, model: LanguageModel, context: Context):
        plan = self._plan
        rule = signed_descent(self.steps, self.learning_rate or 1 / self.steps)
        programs: trainer.Programs = {}

        def one(layer: Layer, _: calibrate.States) -> tuple[Layer, None]:
            flat = dict(trees.flatten(layer.params))
            planned = {path: plan.of(layer.path(path)) for path in flat}
            formats = {path: format for path, format in planned.items() if format}
            loss = BlockError(config=layer.config, formats=tuple(formats.items()))
            kept = {path: layer.masks[path] for path in formats if path in layer.masks}
            for path in formats:
                flat[path] = masked(ops.in_float32(flat[path]), kept.get(path))
            learned = {path: start(flat[path], format) for path, format in formats.items()}
            # Under the name of a layer, by which the trainer shards them.
            begin, frozen = ({"block_0": trees.unflatten(each)} for each in (learned, flat))
            # Where the trainer puts them: so the errors before and after come from one compiled program.
            begin, frozen = (jax.device_put(tree, placement.shardings(tree, context.mesh)) for tree in (begin, frozen))
            rows = [
                {"x": x, "positions": positions, "segments": segments, "wanted": wanted}
                for (x, positions, segments), wanted in zip(layer.rows, layer.wanted, strict=True)
            ]
            task = trainer.Task(
                train=TrainConfig(steps=self.steps),
                loss_fn=loss,
                start=functools.partial(jax.tree.map, jnp.copy, begin),
                batches=_batches(rows, self.batch, context.mesh.devices.size, context.seed),
                frozen=frozen,
                rule=rule,
            )
            found = trainer.fit(task, mesh=context.mesh, title="", programs=programs)
            errors = [_error(loss, learned, frozen, rows) for learned in (begin, found)]

            best = (found if errors[1] < errors[0] else begin)["block_0"]
            for path, format in formats.items():
                flat[path] = stored(flat[path], kept.get(path), _at(best, path), format)
            return layer.replace(params=trees.unflatten(flat)), None

        given = {"mesh": context.mesh, "title": "tuned rounding", "reference": True}
        after, _ = calibrate.walk(model, context.calibration, one, **given)
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


def _error(loss: BlockError, learned: Any, frozen: Any, rows: list[dict[str, jax.Array]]) -> float:
    """The mean error over all rows."""
    found = [_of_rows(loss, learned, frozen, part) for part in rows]
    total, weight = (sum(float(each[i]) for each in found) for i in range(2))
    return total / max(weight, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _of_rows(loss: BlockError, learned: Any, frozen: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    with sharding.mesh_of(part["x"]):
        error, aux = loss(learned, frozen, part)
    return error * aux["weight"], aux["weight"]
