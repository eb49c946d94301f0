"""One optimizer step, for any tree of weights and any loss."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efflm import ops
from efflm.config.train import OnNan
from efflm.model import placement
from efflm.parallel import meshes, sharding
from efflm.precision import LossScale, cast, stochastic_round
from efflm.train.losses import LossFn, weighted_mean


@flax.struct.dataclass
class TrainState:
    """All that one step passes to the next, and all that a checkpoint needs for a run to resume exactly.

    loss_scale is None unless gradients would underflow without it. skipped counts the steps that changed nothing
    because a loss or a gradient was not finite; None if they are not counted. masks: of pruned weights, as a tree like
    trainable (ops.mask_tree); what they drop stays as it is.
    """

    step: jax.Array
    trainable: Any
    optimizer: Any
    loss_scale: LossScale | None = None
    skipped: jax.Array | None = None
    masks: Any = None


def make_init(optimizer: optax.GradientTransformation, like: TrainState):
    """init(trainable, loss_scale, masks) -> the first state, with the shardings of `like`. `trainable` is donated."""
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    initial = jax.jit(functools.partial(_initial, optimizer), donate_argnums=0, out_shardings=where)

    def init(trainable: Any, loss_scale: LossScale | None, masks: Any) -> TrainState:
        # Only a buffer that lies where its result will lie can become it.
        return initial(jax.device_put(trainable, where.trainable, donate=True), loss_scale, masks)

    return init


def abstract_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    loss_scale: LossScale | None = None,
    masks: Any = None,
) -> TrainState:
    """The shapes, dtypes and shardings of the first state, with nothing allocated."""
    shapes = jax.eval_shape(functools.partial(_initial, optimizer), trainable, loss_scale, masks)
    return placement.placed(shapes, mesh)


def _initial(
    optimizer: optax.GradientTransformation, trainable: Any, loss_scale: LossScale | None, masks: Any
) -> TrainState:
    moments = optimizer.init(cast(trainable, jnp.float32))  # float32, also for weights of another dtype
    return TrainState(jnp.int32(0), trainable, moments, loss_scale, jnp.int32(0), masks)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    accumulate: int = 1,
    on_nan: OnNan = "stop",
):
    """A jitted step(state, frozen, batch) -> (state, metrics). The state is donated; metrics stay on the device.

    Gradients are accumulated over `accumulate` equal parts of the batch, read one after another. Gradients and updates
    are float32; weights in bfloat16 are rounded stochastically. With a loss scale, a step whose gradients overflow
    changes nothing but the scale; with on_nan="skip", a step whose loss or gradients are not finite changes nothing
    either. Metrics: "skipped" counts both since the start; "tokens" counts the positions of the batch that hold text;
    "nonfinite" is the index in jax.tree.leaves of the first gradient whose sum of squares is not finite, or -1.

    The new state has the shardings of `state`: if the partitioner chose them, the second step could compile again.
    """
    where = jax.tree.map(lambda array: array.sharding, state)

    @sharding.on_mesh(jax.tree.leaves(where)[0].mesh)
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        scale = state.loss_scale.scale if state.loss_scale else None
        objective = loss_fn if scale is None else functools.partial(_scaled, loss_fn, scale)
        gradients = jax.value_and_grad(objective, has_aux=True)
        if accumulate > 1:
            gradients = functools.partial(_accumulated, gradients, accumulate)
        (loss, aux), grads = gradients(state.trainable, frozen, batch, rng)
        grads = cast(grads, jnp.float32)
        if scale is not None:
            loss = aux.pop("loss")
            grads = jax.tree.map(lambda g: g / scale, grads)
        # Gradients of dropped weights do not reach the optimizer: they would count in its clipping and moments.
        grads = ops.masked(grads, state.masks)
        masters = cast(state.trainable, jnp.float32)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, masters)
        trainable = _apply(state.trainable, masters, ops.masked(updates, state.masks), rng)
        # Clipping needs these sums anyway, so finding the leaf that is not finite takes no other pass over gradients.
        squares = jnp.stack([jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)])
        norm, bad = optax.tree.norm(grads), ~jnp.isfinite(squares)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            **aux,
            "nonfinite": jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
        }
        if "segments" in batch:
            metrics["tokens"] = jnp.sum(batch["segments"] > 0)
        new = state.replace(step=state.step + 1, trainable=trainable, optimizer=optimizer_state)
        if state.loss_scale or on_nan == "skip":
            finite = jnp.isfinite(norm) & (jnp.isfinite(loss) | (on_nan == "stop"))
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            new = new.replace(step=state.step + 1)
            if state.loss_scale:
                new = new.replace(loss_scale=state.loss_scale.after(finite))
                metrics["loss_scale"] = scale
            if state.skipped is not None:
                new = new.replace(skipped=state.skipped + ~finite)
                metrics["skipped"] = new.skipped
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def _scaled(loss_fn: LossFn, scale: jax.Array, *given: Any) -> tuple[jax.Array, Any]:
    """The loss times the scale, and beside its parts itself."""
    loss, aux = loss_fn(*given)
    return loss * scale, aux | {"loss": loss}


def _accumulated(gradients, accumulate, trainable, frozen, batch, rng):
    """What `gradients`, a jax.value_and_grad, gives for the whole batch, read in parts."""
    size = jax.tree.leaves(batch)[0].shape[0]
    meshes.require_shares(size, accumulate, jax.sharding.get_abstract_mesh().shape)
    # Part i has sequences i, i + accumulate, ...: where they are spread over devices, each device keeps its own.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, rows_and_index):
        rows, index = rows_and_index
        values = gradients(trainable, frozen, rows, jax.random.fold_in(rng, index))
        sums, weight = carry
        share = values[0][1].get("weight", jnp.float32(1))
        return (jax.tree.map(lambda total, mean: total + mean * share, sums, values), weight + share), None

    shapes = jax.eval_shape(gradients, trainable, frozen, jax.tree.map(lambda x: x[0], parts), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (sums, weight), _ = lax.scan(add, (zeros, jnp.float32(0)), (parts, jnp.arange(accumulate)))
    (loss, aux), grads = weighted_mean(sums, weight)
    return (loss, aux | ({"weight": weight} if "weight" in aux else {})), grads


def _apply(trainable, masters, updates, rng):
    leaves, tree = jax.tree.flatten(trainable)
    added = jax.tree.leaves(optax.apply_updates(masters, updates))
    rounded = [
        stochastic_round(new, old.dtype, jax.random.fold_in(rng, index))
        for index, (old, new) in enumerate(zip(leaves, added))
    ]
    return jax.tree.unflatten(tree, rounded)


def place(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays [B, T, ...] as arrays on the mesh, split over its axes along B and T."""

    def on_mesh(rows: Any) -> jax.Array:
        spec = NamedSharding(mesh, PartitionSpec(*sharding.BATCH[: rows.ndim]))
        return jax.make_array_from_callback(rows.shape, spec, rows.__getitem__)

    return {name: on_mesh(rows) for name, rows in batch.items()}
