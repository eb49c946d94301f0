"""What every compression shares: the context it runs in, the record it leaves, and training inside a step."""

import dataclasses
import hashlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from efflm import trees
from efflm.config import TrainConfig, require
from efflm.model import LanguageModel
from efflm.ops.qarray import dequantize, requantize, straight_through
from efflm.train import loop, optimizer
from efflm.train.step import LossFn

LINEAR = r"(attention|feedforward)/\w+/kernel$"  # the matrices inside the layers
MATRICES = LINEAR + r"|(^|/)(position_|un)?embedding$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may use beside the model.

    batches: step -> training rows (see data.packing). calibration: rows whose activations a step may look at.
    teacher: what to imitate; a recipe fills in the model it started from.
    """

    batches: loop.Batches | None = None
    calibration: dict[str, np.ndarray] | None = None
    teacher: LanguageModel | None = None
    seed: int = 0
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step did: itself, the leaves it changed, the seed and data it used, the bytes it predicts on disk."""

    step: str
    leaves: tuple[str, ...]
    seed: int
    data: str
    nbytes: int


class Step(Protocol):
    """A compression: from a model to a model. Steps are frozen dataclasses and chain in any order."""

    def __call__(self, model: LanguageModel, context: Context) -> tuple[LanguageModel, Record]: ...


def record(step: Step, before: LanguageModel, after: LanguageModel, context: Context, data: str = "") -> Record:
    """The Record of a step. Raises InputError if the step changed nothing: that is never what was meant."""
    old = dict(trees.flatten(before.params))
    changed = tuple(path for path, leaf in trees.flatten(after.params) if not _same(old.get(path), leaf))
    gone = len(old) - len(trees.flatten(after.params))
    require(
        bool(changed) or gone > 0,
        f"{step} changed nothing: the model already is what it makes, so leave this step out",
    )
    return Record(repr(step), changed, context.seed, data, trees.stored_nbytes(after.params))


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if old is None or jax.tree.structure(old) != jax.tree.structure(new):
        return False
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)))


def batches_digest(context: Context) -> str:
    """A short hash of the first batch, which with the seed fixes all of them."""
    first = context.batches(0)
    digest = hashlib.sha256()
    for name in sorted(first):
        digest.update(np.ascontiguousarray(first[name]).tobytes())
    return digest.hexdigest()[:16]


def keep_zeros(inner: optax.GradientTransformation, selected: str = LINEAR) -> optax.GradientTransformation:
    """Wrap an optimizer so that weights that are exactly zero when it is initialized stay so.

    The mask is read off the selected matrices into the state, where it is sharded and saved like a moment.
    """

    def init(params):
        paths = {path for path, _ in trees.select(params, selected)}
        masks = trees.map_with_path(lambda path, w: (w != 0) if path in paths else None, params)
        return masks, inner.init(params)

    def update(updates, state, params=None, **extra):
        masks, inner_state = state
        masked = lambda tree: jax.tree.map(
            lambda mask, u: u if mask is None else u * mask.astype(u.dtype), masks, tree, is_leaf=lambda x: x is None
        )
        updates, inner_state = inner.update(masked(updates), inner_state, params, **extra)
        return masked(updates), (masks, inner_state)

    return optax.GradientTransformation(init, update)


def require_schedule(step: Any) -> None:
    """Check the settings that every training step has."""
    require(step.steps > 0, f"steps is {step.steps}, but must be positive")
    require(step.learning_rate > 0, f"learning_rate is {step.learning_rate}, but must be positive")


def train_step(
    step: Any, model: LanguageModel, context: Context, loss_fn: LossFn, frozen: Any
) -> tuple[LanguageModel, Record]:
    """Train `model` with `step`'s steps and learning_rate, in the format it is in.

    Zeros stay zeros. The masters are float32; int8 weights are rounded straight-through in every forward pass, and
    for good at the end. The loss sees the parameters in their format's values, as floats.
    """
    require(context.batches is not None, f"{step} needs text to train on: give a corpus")
    like = model.params
    on_weights = lambda fn, tree: jax.tree.map(lambda weight, w: fn(w, weight), like, tree, is_leaf=trees.is_leaf)
    masters = jax.tree.map(lambda weight: dequantize(weight).astype(jnp.float32), like, is_leaf=trees.is_leaf)
    settings = TrainConfig(steps=step.steps, learning_rate=step.learning_rate, weight_decay=0.0)
    trained = loop.fit(
        lambda trainable, *rest: loss_fn(on_weights(straight_through, trainable), *rest),
        masters,
        frozen,
        context.batches,
        keep_zeros(optimizer.make(settings)),
        steps=step.steps,
        mesh=context.mesh,
        seed=context.seed,
        title=type(step).__name__.lower(),
    )
    after = LanguageModel(model.config, on_weights(requantize, trained))
    return after, record(step, model, after, context, batches_digest(context))
