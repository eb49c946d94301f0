"""The training step as a program to compile, for any mesh and with no weights: shapes and shardings in their place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from efflm.config import ModelConfig, TrainConfig
from efflm.model import init_params, sharding, stack_blocks
from efflm.precision import POLICIES, cast, loss_scale_for
from efflm.train import losses, optimizer
from efflm.train.step import abstract_state, make_step

FIELDS = ("inputs", "targets", "segments", "positions")  # of a batch of data.packing, int32 [B, T] each


def training_step(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step that train.loop runs, and its arguments (state, frozen, batch) without their values.

    `step.lower(*arguments).compile()` is the program; the mesh's devices may be ones that are not attached.
    """
    policy, rule = POLICIES[train.policy], optimizer.make(train)

    def fresh() -> Any:
        params = init_params(config, 0)
        return cast(stack_blocks(params, config) if train.scan else params, policy.param)

    state = abstract_state(jax.eval_shape(fresh), rule, mesh, loss_scale_for(policy))
    rows = jax.ShapeDtypeStruct((train.batch, train.length), jnp.int32, sharding=NamedSharding(mesh, sharding.BATCH))
    loss = losses.language_model_loss(config, policy, scanned=train.scan, remat=train.remat, z_loss=train.z_loss)
    return make_step(loss, rule, 0, state, train.accumulate), (state, {}, dict.fromkeys(FIELDS, rows))
