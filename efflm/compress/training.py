"""Training inside a step: what is trained of the model (a Parametrization), by which loss (an Objective), on which
batches. `train` brings them together; how it runs is told by the step's own fields of config.train.TrainSettings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efflm import ops, trees
from efflm.compress.step import Context, Record, record
from efflm.config import require
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel, Transformer, autotune, require_same_tokenizer, stack_blocks
from efflm.model.transformer import runs
from efflm.precision import POLICIES, cast, policy_for
from efflm.train import callbacks, losses, trainer
from efflm.train.losses import LossFn
from efflm.train.trainer import Batches

# The loss of (params that are trained, the teacher's params, batch, rng), and the teacher's params.
Objective = tuple[LossFn, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """What of a model is trained, and what the loss sees of it.

    start() makes what is trained, float32 in arrays of its own, in a tree whose paths hold those of the weights.
    seen(trainable, frozen) -> the params that the loss is of; frozen: arrays that it reads and that stay as they are.
    finished(trained) -> the model, of float32. masks: of pruned weights, by paths of what is trained. wrap: of the
    update rule.
    """

    start: Callable[[], Any]
    seen: Callable[[Any, Any], Any]
    finished: Callable[[Any], LanguageModel]
    frozen: Any = dataclasses.field(default_factory=dict)
    masks: ops.Masks = None
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda rule: rule


def masters(model: LanguageModel) -> Any:
    """The weights as float32, in arrays of their own."""
    return jax.tree.map(lambda w: jnp.array(ops.dequantize(w), jnp.float32), model.params, is_leaf=trees.is_leaf)


def full(model: LanguageModel, beside: Mapping[str, Any] | None = None) -> Parametrization:
    """All weights. Quantized ones are rounded straight-through in every forward pass, and for good at the end, by the
    scales and zeros that they have.

    beside: trees that are trained with the weights, by their names (see params.BESIDE): in what the loss sees they are
    beside the weights; at the end they are dropped.
    """

    def seen(trainable: Any, quantized: dict[str, Any]) -> Any:
        rounded = lambda path, like, w: ops.straight_through(w, quantized.get(path, like))
        return trainable | of_weights(rounded, model, trainable)

    stored = lambda _, like, w: ops.requantize(w, like)
    return Parametrization(
        start=lambda: masters(model) | jax.tree.map(jnp.copy, dict(beside or {})),
        seen=seen,
        finished=lambda trained: model.replace(params=of_weights(stored, model, trained)),
        frozen={path: w for path, w in trees.flatten(model.params) if isinstance(w, ops.QArray)},
        masks=model.masks,
    )


def of_weights(fn: Callable[[str, Any, jax.Array], Any], model: LanguageModel, trainable: Any) -> Any:
    """fn(path, weight of the model, what is trained for it) of each weight, without what is trained beside them."""
    return trees.map_with_path(fn, model.params, {name: trainable[name] for name in model.params})


def teacher_of(step: TrainSettings, context: Context, model: LanguageModel) -> LanguageModel:
    """The teacher, run as the step says. Raises InputError if there is none, or one with other tokens, or with another
    tokenizer where it is known of both models what they were trained with."""
    teacher = context.teacher
    require(teacher is not None, "distillation needs a teacher: set context.teacher")
    require(
        teacher.config.tokens == model.config.tokens,
        f"the teacher's vocabulary is {teacher.config.tokens}, the student's {model.config.tokens}, without padding: "
        "give a teacher that has the student's tokenizer",
    )
    require_same_tokenizer(teacher, model, "teacher", "student")
    return in_policy(step, teacher)


def text_of(step: TrainSettings, context: Context) -> Batches:
    """The batches to train on. Raises InputError if there are none."""
    require(context.batches is not None, f"{type(step).__name__} needs text to train on: give a corpus")
    return context.batches


def measured(step: Any, model: LanguageModel, context: Context) -> Any:
    """The step, the policy that is the fastest on this machine in place of policy="auto" (see model.autotune)."""
    if getattr(step, "policy", "") != autotune.AUTO:
        return step
    picked = autotune.trained(model, *text_of(step, context)(0)["inputs"].shape)
    return dataclasses.replace(step, policy=picked.config.precision)


def in_policy(step: TrainSettings, model: LanguageModel) -> LanguageModel:
    """The model, run with the step's policy where that names one."""
    if not step.policy:
        return model
    return model.replace(config=dataclasses.replace(model.config, precision=POLICIES[step.policy].compute))


def objective(
    step: TrainSettings, model: LanguageModel, teacher: LanguageModel | None = None, *, cached: bool = False, **how: Any
) -> Objective:
    """The cross-entropy of the text; with a teacher losses.distillation_loss, `cached` losses.cached_distillation_loss.
    how: the settings of these two, which text alone has none of. Raises InputError."""
    config, policy = model.config, policy_for(in_policy(step, model).config)
    run = {"scanned": step.scan, "remat": step.remat}
    if not (teacher or cached):
        return _stacked(losses.language_model_loss(config, policy, **run, z_loss=step.z_loss), step, model), {}
    require(step.z_loss == 0, f"z_loss is {step.z_loss}, but is part of the loss on text alone: leave it out")
    require(not (step.scan and how.get("layers")), "scan hides what layers give: leave it out, or hidden and attention")
    student = Transformer(config, policy, **run)
    if cached:
        return _stacked(losses.cached_distillation_loss(student, **how), step, model), {}
    imitated = Transformer(teacher.config, policy_for(teacher.config))
    loss = losses.distillation_loss(student, imitated, **{"temperature": 1.0, "weight": 1.0} | how)
    return _stacked(loss, step, model), teacher.params


def _stacked(loss: LossFn, step: TrainSettings, model: LanguageModel) -> LossFn:
    """With `scan`, the loss of weights whose layers are stacked in every step: a copy of them. Raises InputError."""
    if not step.scan:
        return loss
    for first, count in runs(model.config):
        kinds = {jax.tree.structure(model.params[f"block_{i}"]) for i in range(first, first + count)}
        require(len(kinds) == 1, "scan loops over layers in one format, and those of this model differ: leave it out")
    return lambda params, *given: loss(stack_blocks(params, model.config), *given)


def train(
    step: TrainSettings,
    model: LanguageModel,
    context: Context,
    parametrization: Parametrization,
    objective: Objective,
    batches: Batches | None = None,
) -> tuple[LanguageModel, Record]:
    """The model after training. batches: in place of the context's."""
    batches = batches or text_of(step, context)
    loss_fn, teacher = objective
    settings = dataclasses.replace(step, policy=step.policy or model.config.precision)

    def loss(trainable: Any, frozen: Any, batch: Any, rng: jax.Array):
        return loss_fn(parametrization.seen(trainable, frozen["model"]), frozen["teacher"], batch, rng)

    def start():
        return cast(parametrization.start(), POLICIES[settings.policy].param)

    task = trainer.Task(
        train=settings,
        loss_fn=loss,
        start=start,
        frozen={"model": parametrization.frozen, "teacher": teacher},
        batches=batches,
        wrap=parametrization.wrap,
        masks=ops.mask_tree(jax.eval_shape(start), parametrization.masks),
        finish=lambda trained: parametrization.finished(cast(trained, jnp.float32)),
    )
    title, watched = type(step).__name__.lower(), [*context.watched, callbacks.lines(context.metrics)]
    after = trainer.fit(task, mesh=context.mesh, seed=context.seed, title=title, watched=watched)
    return after, record(step, model, after, context)
