"""The trainer: what is trained on what (Task), and the one loop that trains it (fit)."""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from efflm import malloc
from efflm.cli import signals
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig, TrainSettings
from efflm.model import LanguageModel, init_params, stack_blocks, unstack_blocks
from efflm.model.placement import shardings
from efflm.parallel import processes
from efflm.precision import POLICIES, LossScale, cast, loss_scale_for
from efflm.train import callbacks, losses, optimizer
from efflm.train.checkpointing import Checkpointing, TrainingRun
from efflm.train.losses import LossFn
from efflm.train.step import TrainState, abstract_state, make_init, make_step, place
from efflm.train.training import Callback, Training

Batches = Callable[[int], dict[str, Any]]  # step -> its rows (see `place`), a function of the step alone
Programs = dict[Hashable, tuple[Callable, Callable]]  # by all that they depend on: the jitted init and step
REMEDY = (  # where the training of a model diverges
    "lower train.learning_rate, lengthen train.warmup, set train.policy to bfloat16, or leave such steps out with "
    "train.on_nan=skip"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, with which loss, on what: any tree of arrays.

    train: the steps, the optimizer with its schedule, precision, accumulation; its batch and length are the business of
    `batches`. start: makes the weights to start from, which are donated, so they must be nobody else's; shapes: of what
    it makes, for one that cannot be traced by jax.eval_shape. frozen: what the loss sees beside them. rule: in place of
    optimizer.make(train); wrap: what is made of it. loss_scale: in place of the policy's. masks: a tree like the
    weights (ops.mask_tree); what they drop stays as it is. remedy: what to do where it diverges. finish: what is made
    of the trained tree.
    """

    train: TrainSettings
    loss_fn: LossFn
    start: Callable[[], Any]
    batches: Batches
    frozen: Any = dataclasses.field(default_factory=dict)
    rule: optax.GradientTransformation | None = None
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda rule: rule
    shapes: Any = None
    loss_scale: LossScale | None = None
    masks: Any = None
    remedy: str = "lower the learning rate"
    finish: Callable[[Any], Any] = lambda trained: trained


def model_task(
    config: ModelConfig,
    train: TrainConfig,
    start: Callable[[], Any],
    batches: Batches,
    rule: optax.GradientTransformation | None = None,
) -> Task:
    """Training a model of this config on text; `fit` gives the LanguageModel, its weights in the dtype of the policy.

    start: makes the float weights to start from, not stacked.
    """
    policy = POLICIES[train.policy]
    trainable = lambda params: cast(stack_blocks(params, config) if train.scan else params, policy.param)
    return Task(
        train=train,
        loss_fn=losses.language_model_loss(config, policy, scanned=train.scan, remat=train.remat, z_loss=train.z_loss),
        start=lambda: trainable(start()),
        batches=batches,
        rule=rule,
        shapes=jax.eval_shape(lambda: trainable(init_params(config, 0))),
        remedy=REMEDY,
        finish=lambda trained: LanguageModel(config, unstack_blocks(trained, config) if train.scan else trained),
    )


def prepared(
    task: Task, mesh: Mesh, seed: int = 0, programs: Programs | None = None
) -> tuple[TrainState, Callable[[Any], TrainState], Callable]:
    """The shapes, dtypes and shardings of the state, with nothing allocated, so that the mesh need not be attached;
    init(weights) -> the first state; and the jitted step (see step.make_step)."""
    train, programs = task.train, {} if programs is None else programs
    rule = task.wrap(task.rule or optimizer.make(train))
    scale = task.loss_scale or loss_scale_for(POLICIES[train.policy])
    shapes = jax.eval_shape(task.start) if task.shapes is None else task.shapes
    like = abstract_state(shapes, rule, mesh, scale, task.masks)
    settings = (task.loss_fn, task.rule or train, task.wrap, seed, train.accumulate, train.on_nan)
    key = (*settings, jax.tree.structure(like), *jax.tree.leaves(like))
    if key not in programs:
        step = make_step(task.loss_fn, rule, seed, like, train.accumulate, train.on_nan)
        programs[key] = make_init(rule, like), step
    init, step = programs[key]
    return like, lambda weights: init(weights, scale, task.masks), step


def fit(
    task: Task,
    *,
    mesh: Mesh,
    seed: int = 0,
    title: str = "training",
    watched: Sequence[Callback] = (),
    checkpointing: Checkpointing | None = None,
    programs: Programs | None = None,
) -> Any:
    """Train for all steps of the task and return what it makes of the trained tree: Schedule-Free's averaged one where
    that is the optimizer.

    task.start is called only if no checkpoint is resumed; of the weights nothing but the state stays in memory. A step
    is dispatched before the metrics of the one before it are fetched, so the device never waits for the host. watched:
    by which callbacks, in their order; a bar and a watchdog come with a `title`, "" has neither. programs: what
    earlier runs with the same loss and optimizer have compiled, by their shapes; a run adds to it. For many short
    runs: without it each one compiles.

    With `checkpointing`, the run goes on from its newest good checkpoint, to the same metrics and weights as if it had
    never stopped, bit for bit on one device. Every step up to a checkpoint is known to have been finite before that is
    written. SIGTERM or Ctrl-C ends the run after the step in flight with a checkpoint and raises Stopped.

    Raises InputError if the loss or a gradient is not finite, unless the step was skipped: for a lower loss scale, or
    because of on_nan="skip"; and if every step was. These say to do what task.remedy is. Raises it too if a checkpoint
    cannot be written; the one before is left as it is. Raises Interrupted for what the last checkpoint survives:
    lost machines, storage that fails.
    """
    steps = task.train.steps
    like, init, step_fn = prepared(task, mesh, seed, programs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.begun())
        # Signals are caught until the last checkpoint is written, so this is the last to be left.
        asked_to_stop = stack.enter_context(signals.stop_requests()) if checkpointing else None
        saved = stack.enter_context(TrainingRun(checkpointing)) if checkpointing else None
        state = saved.resume(like) if saved else None
        if state is None:
            state = init(task.start())
        first = int(state.step)
        require(
            first <= steps,
            f"the checkpoint is that of step {first}, but this run asks for train.steps={steps}: raise it, or "
            "give another folder",
        )
        if first and title:
            print(f"  {title}: going on from step {first} of {steps}", flush=True)
        frozen = jax.device_put(task.frozen, shardings(task.frozen, mesh))
        training = Training(
            train=task.train,
            loss_fn=task.loss_fn,
            frozen=frozen,
            mesh=mesh,
            title=title,
            remedy=task.remedy,
            first=first,
            rate=None if task.rule else optimizer.rate(task.train),
        )
        usual = [callbacks.watchdog, callbacks.bar] if title and processes.is_first() else []
        last = [saved.saving(asked_to_stop)] if saved else []
        after_step = [stack.enter_context(each(training)) for each in (*watched, *usual, *last)]
        for step in range(first, steps):
            state, metrics = step_fn(state, frozen, place(task.batches(step), mesh))
            training.add(state, metrics)
            if step == first and programs is None:  # what lives until the end is not looked through again and again
                stack.enter_context(malloc.older_left())
            for after in after_step:
                after()
        training.fetch()
        return task.finish(optimizer.evaluation_params(state.optimizer, state.trainable))
