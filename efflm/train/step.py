"""One optimizer step, for whatever is trained."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from efflm.model import sharding

# loss_fn(trainable, frozen, batch, rng) -> (scalar loss, dict of scalars)
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """What one step hands to the next."""

    step: jax.Array
    trainable: Any
    optimizer: Any


def init_state(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state on the mesh, its optimizer moments sharded like the weights. The given arrays are copied, not donated."""
    fresh = lambda tree: TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, tree), optimizer.init(tree))
    specs = sharding.shardings(jax.eval_shape(fresh, trainable), mesh)
    return jax.jit(fresh, out_shardings=specs)(trainable)


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, seed: int, state: TrainState):
    """A jitted step(state, frozen, batch) -> (state, metrics). The state is donated; metrics stay on the device.

    The new state lies where `state` does: left to the partitioner it could move, and the second step compile again.
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, aux), grads = grad_fn(state.trainable, frozen, batch, rng)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **aux}
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    where = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def place(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays onto the mesh, rows split over its data axes; each host reads only its own rows of them."""
    spec = NamedSharding(mesh, sharding.BATCH)
    return {
        name: jax.make_array_from_callback(rows.shape, spec, lambda index, rows=rows: rows[index])
        for name, rows in batch.items()
    }
