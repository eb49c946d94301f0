"""What every compression shares: the context it runs in, the record it leaves, and training inside a step."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.cli import run_directory
from efflm.config import flag, require
from efflm.config.train import TrainConfig
from efflm.model import LanguageModel, require_same_tokenizer
from efflm.train import callbacks, optimizer, trainer
from efflm.train.losses import LossFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration text: what steps that need it see the model read"""

    rows: int = flag(128, "sequences of the training split")
    length: int = flag(512, "tokens in each; no more than the model reads")

    def __post_init__(self):
        for name in ("rows", "length"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may use beside the model.

    batches: step -> a batch to train on (see data.packing). calibration: a batch whose activations a step may look at.
    teacher: what to imitate; a recipe fills in the model it started from. corpus, tokenizer: digests of the text that
    batches and calibration are from and of what made tokens of it, for the records. metrics: the file that a step which
    trains writes its metrics to; of a recipe the folder, in which each step has a file.
    cache: the folder that a teacher's cache is kept in; None: one that is removed after use.
    """

    batches: trainer.Batches | None = None
    calibration: dict[str, np.ndarray] | None = None
    teacher: LanguageModel | None = None
    seed: int = 0
    corpus: str = ""
    tokenizer: str = ""
    metrics: Path | None = None
    cache: Path | None = None
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step did, for the lineage of a model.

    step: its name; settings: its fields, and under "removed" what a search for a target found. leaves: the weights it
    changed. seed: of the context. corpus, tokenizer: digests of the text it used, "" where it used none.
    predicted_bytes: of the tensors of the model it made, as a file holds them. parent: the digest of the model it was
    applied to.
    """

    step: str
    settings: dict[str, Any]
    leaves: tuple[str, ...]
    seed: int
    corpus: str
    tokenizer: str
    predicted_bytes: int
    parent: str


class Step(Protocol):
    """A compression: from a model to a model. Steps are frozen dataclasses and chain in any order.

    A step says of itself, where it is so: trains = True, it needs text to train on; calibrates = True, it looks at what
    the model computes of calibration text; at = "bits", the field that a value after its name sets, as in gptq@3; or a
    function from that value to the text of each field that it sets.
    """

    def __call__(self, model: LanguageModel, context: Context) -> tuple[LanguageModel, Record]: ...


def trains(steps: Sequence[Step]) -> bool:
    """Whether a step of the chain needs text to train on."""
    return any(getattr(step, "trains", False) for step in steps)


def calibrates(steps: Sequence[Step]) -> bool:
    """Whether a step of the chain looks at what the model computes of calibration text."""
    return any(getattr(step, "calibrates", False) for step in steps)


def reads_text(steps: Sequence[Step]) -> bool:
    return trains(steps) or calibrates(steps)


def record(
    step: Step,
    before: LanguageModel,
    after: LanguageModel,
    context: Context,
    removed: Mapping[str, float] | None = None,
) -> Record:
    """The Record of a step. removed: what a search for a target found. Raises InputError if the step changed nothing:
    that is never what was meant."""
    old, new = dict(trees.flatten(before.params)), dict(trees.flatten(after.params))
    uses_text = reads_text([step])
    changed = tuple(path for path, leaf in new.items() if not _same(old.get(path), leaf))
    same = not changed and old.keys() == new.keys() and before.config == after.config
    require(
        not same or not _same(before.masks, after.masks),
        f"{step} changed nothing: the model already is what it makes, so leave this step out",
    )
    return Record(
        step=type(step).__name__,
        settings={name: value for name, value in dataclasses.asdict(step).items() if value is not None}
        | ({"removed": dict(removed)} if removed else {}),
        leaves=changed,
        seed=context.seed,
        corpus=context.corpus if uses_text else "",
        tokenizer=context.tokenizer if uses_text else "",
        predicted_bytes=ops.stored_nbytes(after.params, after.masks),
        parent=digest(before),
    )


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if old is None or jax.tree.structure(old) != jax.tree.structure(new):
        return False
    return all(map(trees.equal, jax.tree.leaves(old), jax.tree.leaves(new)))


def digest(model: LanguageModel) -> str:
    """A short SHA-256 of the config and of every array of a model, masks included: two models with the same digest are
    the same, on whatever devices they are."""
    out = hashlib.sha256(run_directory.to_json(model.config.to_dict(), sort_keys=True).encode())
    for path, array in trees.flatten({"params": model.params, "masks": dict(model.masks or {})}, inside=True):
        out.update(f"{path} {array.dtype} {array.shape}".encode())
        out.update(np.ascontiguousarray(trees.on_host(array)).view(np.uint8).data)
    return out.hexdigest()[:16]


Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
Beside = Mapping[str, Any]
NOTHING: Beside = MappingProxyType({})


def require_schedule(step: Any) -> None:
    """Check the settings that every training step has."""
    require(step.steps > 0, f"steps is {step.steps}, but must be positive")
    require(step.learning_rate > 0, f"learning_rate is {step.learning_rate}, but must be positive")


def teacher_of(context: Context, model: LanguageModel) -> LanguageModel:
    """The teacher. Raises InputError if there is none, or one with other tokens, or with another tokenizer where
    it is known of both models what they were trained with."""
    teacher = context.teacher
    require(teacher is not None, "distillation needs a teacher: set context.teacher")
    require(
        teacher.config.tokens == model.config.tokens,
        f"the teacher's vocabulary is {teacher.config.tokens}, the student's {model.config.tokens}, without padding: "
        "give a teacher that has the student's tokenizer",
    )
    require_same_tokenizer(teacher, model, "teacher", "student")
    return teacher


def train_step(
    step: Any, model: LanguageModel, context: Context, loss_fn: LossFn, frozen: Any, beside: Beside = NOTHING
) -> tuple[LanguageModel, Record]:
    """`model` after `train_masters`, in the format it is in; what was trained beside it is dropped."""
    trained = train_masters(step, model, context, loss_fn, frozen, beside=beside)
    after = model.replace(params=in_format(trained, model.params))
    return after, record(step, model, after, context)


def train_masters(
    step: Any,
    model: LanguageModel,
    context: Context,
    loss_fn: LossFn,
    frozen: Any,
    wrap: Wrap | None = None,
    beside: Beside = NOTHING,
) -> Any:
    """The float32 weights of `model` trained with `step`'s steps and learning_rate, as its format will round them.

    Pruned weights stay zero. Quantized weights are rounded straight-through in every forward pass: the loss sees the
    parameters as `ops.straight_through` makes them. wrap: of the update rule. beside: trees that are trained with the
    weights, by their names (see params.BESIDE): in what the loss sees and in the result, they are beside the weights.
    """

    def loss(trainable: Any, *rest: Any):
        return loss_fn(trainable | _on_weights(ops.straight_through, trainable, model.params), *rest)

    def start():
        return masters(model) | jax.tree.map(jnp.copy, dict(beside))

    return fit(step, context, loss, start, frozen, model.masks, wrap)


def masters(model: LanguageModel) -> Any:
    """The weights as float32, in arrays of their own."""
    return jax.tree.map(lambda w: jnp.array(ops.dequantize(w), jnp.float32), model.params, is_leaf=trees.is_leaf)


def in_format(trained: Any, like: Any) -> Any:
    """Float masters, each in the format of its weight in `like`, and nothing that is no weight in it."""
    return _on_weights(ops.requantize, trained, like)


def _on_weights(fn: Callable[[Any, Any], Any], tree: Any, like: Any) -> Any:
    weights = {name: tree[name] for name in like}
    return jax.tree.map(lambda weight, w: fn(w, weight), like, weights, is_leaf=trees.is_leaf)


def fit(
    step: Any,
    context: Context,
    loss_fn: LossFn,
    start: Callable[[], Any],
    frozen: Any,
    masks: ops.Masks,
    wrap: Wrap | None = None,
) -> Any:
    """What `start` makes, trained on the text of the context with `step`'s steps and learning_rate (see trainer.fit).
    masks: of its paths."""
    require(context.batches is not None, f"{step} needs text to train on: give a corpus")
    settings = TrainConfig(steps=step.steps, learning_rate=step.learning_rate, weight_decay=0.0)
    task = trainer.Task(
        train=settings,
        loss_fn=loss_fn,
        start=start,
        frozen=frozen,
        batches=context.batches,
        rule=wrap and wrap(optimizer.make(settings)),
        masks=ops.mask_tree(jax.eval_shape(start), masks),
    )
    title, watched = type(step).__name__.lower(), [callbacks.lines(context.metrics)]
    return trainer.fit(task, mesh=context.mesh, seed=context.seed, title=title, watched=watched)
