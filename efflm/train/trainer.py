"""What a TrainConfig means: the one place where model, loss, optimizer and precision become a training run."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from efflm import ops
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import LanguageModel, init_params, stack_blocks, unstack_blocks
from efflm.precision import POLICIES, cast, loss_scale_for
from efflm.train import loop, losses, optimizer, step
from efflm.train.loop import Batches
from efflm.train.losses import LossFn
from efflm.train.step import TrainState

Rule = optax.GradientTransformation | None  # in place of optimizer.make(train): a wrapper of it, say
REMEDY = (  # where training diverges
    "lower train.learning_rate, lengthen train.warmup, set train.policy to bfloat16, or leave such steps out with "
    "train.on_nan=skip"
)


def fit_model(
    config: ModelConfig,
    start: Callable[[], Any],
    train: TrainConfig,
    batches: Batches,
    rule: Rule = None,
    masks: ops.Masks = None,
    **run,
) -> LanguageModel:
    """A model of this config trained on text as `train` says, its weights in the dtype of the policy.

    start: makes the float weights to start from, which are donated; it is called only if no checkpoint is resumed (see
    loop.fit). masks: of pruned weights, which stay as they are. `run`: see `fit`.
    """
    kept = ops.mask_tree(jax.eval_shape(lambda: init_params(config, 0)), masks)
    trained = fit(
        train,
        language_model_loss(config, train),
        lambda: _trainable(start(), config, train),
        {},
        batches,
        rule,
        shapes=_shapes(config, train),
        masks=stack_blocks(kept, config) if kept and train.scan else kept,
        remedy=REMEDY,
        **run,
    )
    return LanguageModel(config, unstack_blocks(trained, config) if train.scan else trained, masks)


def fit(train: TrainConfig, loss_fn: LossFn, start, frozen, batches: Batches, rule: Rule = None, **run) -> Any:
    """loop.fit, told all that `train` says. `run`: its mesh, seed, title, files, checkpointing and profile."""
    return loop.fit(
        loss_fn,
        start,
        frozen,
        batches,
        rule or optimizer.make(train),
        steps=train.steps,
        accumulate=train.accumulate,
        loss_scale=loss_scale_for(POLICIES[train.policy]),
        on_nan=train.on_nan,
        log_every=train.log_every,
        **run,
    )


def init_state(config: ModelConfig, train: TrainConfig, mesh: Mesh, seed: int = 0) -> TrainState:
    """The state that training a fresh model starts from."""
    init = step.make_init(optimizer.make(train), abstract_state(config, train, mesh))
    return init(
        _trainable(init_params(config, seed, mesh), config, train), loss_scale_for(POLICIES[train.policy]), None
    )


def abstract_state(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s, with nothing allocated; the mesh need not be attached."""
    return step.abstract_state(
        _shapes(config, train), optimizer.make(train), mesh, loss_scale_for(POLICIES[train.policy])
    )


def make_step(config: ModelConfig, train: TrainConfig, state: TrainState, seed: int = 0) -> Any:
    """The jitted step that `fit_model` runs on a state of either kind (see step.make_step)."""
    loss_fn = language_model_loss(config, train)
    return step.make_step(loss_fn, optimizer.make(train), seed, state, train.accumulate, train.on_nan)


def language_model_loss(config: ModelConfig, train: TrainConfig) -> LossFn:
    policy = POLICIES[train.policy]
    return losses.language_model_loss(config, policy, scanned=train.scan, remat=train.remat, z_loss=train.z_loss)


def _trainable(params: Any, config: ModelConfig, train: TrainConfig) -> Any:
    return cast(stack_blocks(params, config) if train.scan else params, POLICIES[train.policy].param)


def _shapes(config: ModelConfig, train: TrainConfig) -> Any:
    """Of `_trainable`'s weights, with nothing allocated."""
    return jax.eval_shape(lambda: _trainable(init_params(config, 0), config, train))
