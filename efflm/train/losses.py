"""Losses over the targets of a batch, in nats and float32."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm import ops
from efflm.config.model import ModelConfig
from efflm.config.train import Remat
from efflm.model import Gathered, Transformer, final_states_and_gathered
from efflm.model.params import HEAD_MIXTURE, HIDDEN_PROJECTION
from efflm.parallel import sequence_parallel
from efflm.precision import FLOAT32, Policy

# loss_fn(trainable, frozen, batch, rng) -> (scalar loss, dict of scalars). A loss that is a mean over weighted targets
# gives the sum of their weights as "weight": so the parts of an accumulated batch add up to exactly the whole.
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Layers = Sequence[tuple[int, int]]  # a student's layer and the teacher's that it is compared with, counted from 0


def weighted_mean(sums: Any, weight: jax.Array) -> Any:
    """Means of a tree of weighted sums, given the sum of the weights; 0 where that is 0."""
    return jax.tree.map(lambda total: total / jnp.where(weight > 0, weight, 1), sums)


def language_model_loss(
    config: ModelConfig, policy: Policy = FLOAT32, *, scanned: bool = False, remat: Remat = "none", z_loss: float = 0.0
) -> LossFn:
    """The mean cross-entropy of params, in nats, plus z_loss * log_normalizer^2 (see ops.cross_entropy)."""
    model = Transformer(config, policy, scanned, remat)

    def sums(params, frozen, batch, weights_BT):
        del frozen
        x_BTD, _ = model.apply({"params": params}, **_inputs(batch), method=Transformer.final_states)
        how = {"tied": config.tied, "cap": config.logit_cap, "z_weight": z_loss}
        total, nll = ops.cross_entropy(x_BTD, _reader(params, config), batch["targets"], weights_BT, **how)
        return {"loss": total} | ({"cross_entropy": nll} if z_loss else {})

    return _mean_over_tokens(sums)


def distillation_loss(
    student: Transformer,
    teacher: Transformer,
    *,
    temperature: float,
    weight: float,
    divergence: ops.Divergence = "forward",
    mix: float = 0.5,
    hidden: float = 0.0,
    attention: float = 0.0,
    layers: Layers = (),
) -> LossFn:
    """The mean over targets of weight * T^2 * divergence + (1 - weight) * cross-entropy, in nats; plus hidden *
    `hidden_state_error` and attention * `attention_divergence` of the layers, where these weights are not 0.

    T is the temperature; divergence: of teacher and student, `mix` the teacher's share in the mixture that some of them
    have (see ops.divergences). The teacher's params are `frozen`; no gradient flows to them. See ops.distillation.
    """
    how = {"temperature": temperature, "share": weight, "divergence": divergence, "mix": mix}
    how |= _of_logits(student.config, teacher.config)
    wanted = {"outputs": hidden > 0, "probabilities": attention > 0}

    def sums(params, frozen, batch, weights_BT):
        models = (student, params), (teacher, frozen)
        outputs, found = zip(*(_final_states(*each, batch, **wanted) for each in models), strict=True)
        total, apart, nll = ops.distillation(*outputs, batch["targets"], weights_BT, **how)
        parts = {"loss": total, "divergence": apart, "cross_entropy": nll}
        if hidden:
            projections, states = params.get(HIDDEN_PROJECTION, {}), [each.outputs for each in found]
            error = hidden_state_error(*states, projections, layers, weights_BT, student.policy.compute)
            parts |= {"loss": parts["loss"] + hidden * error, "hidden": error}
        if attention:
            mixtures, probabilities = params.get(HEAD_MIXTURE, {}), [each.probabilities for each in found]
            apart = attention_divergence(*probabilities, mixtures, layers, weights_BT)
            parts |= {"loss": parts["loss"] + attention * apart, "attention": apart}
        return parts

    return _mean_over_tokens(sums)


def cached_distillation_loss(student: Transformer, *, weight: float) -> LossFn:
    """The mean over targets of weight * KL(teacher || student) + (1 - weight) * cross-entropy, in nats, for batches
    that hold what was kept of the teacher: "teacher_p" and, where that is not all, "teacher_ids" (see
    ops.cached_distillation)."""

    def sums(params, frozen, batch, weights_BT):
        del frozen
        kept = batch["teacher_p"], batch.get("teacher_ids")
        outputs, _ = _final_states(student, params, batch)
        how = {"share": weight, "unused": student.config.unused, "cap": student.config.logit_cap}
        total, apart, nll = ops.cached_distillation(outputs, *kept, batch["targets"], weights_BT, **how)
        return {"loss": total, "divergence": apart, "cross_entropy": nll}

    return _mean_over_tokens(sums)


def hidden_state_error(
    states: Sequence[jax.Array],
    teacher_states: Sequence[jax.Array],
    projections: Any,
    layers: Layers,
    weights_BT: jax.Array,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The weighted sum over tokens of mean squared errors between hidden states, added up over the layers.

    TinyBERT (Jiao 2019, arXiv 1909.10351), equation 8: the output [B, T, D] of each of the student's layers, times its
    projection [D, E], against the output [B, T, E] of the teacher's layer beside it. states: the outputs of all layers.
    projections: {projection_name(layer): matrix}; a layer without one is compared as it is. dtype: of these matmuls'
    operands. No gradient flows to the teacher's states.
    """
    total = jnp.float32(0)
    for layer, teacher_layer in layers:
        x_BTE, name = states[layer], projection_name(layer)
        if name in projections:
            x_BTE = ops.dot(x_BTE.astype(dtype), projections[name])
        error_BTE = x_BTE - lax.stop_gradient(teacher_states[teacher_layer])
        total = total + jnp.sum(weights_BT * jnp.mean(jnp.square(error_BTE), axis=-1))
    return total


def attention_divergence(
    probabilities: Sequence[jax.Array],
    teacher_probabilities: Sequence[jax.Array],
    mixtures: Any,
    layers: Layers,
    weights_BT: jax.Array,
) -> jax.Array:
    """The weighted sum over queries of KL(teacher's attention || student's), the mean over the teacher's heads, in
    nats, added up over the layers.

    MiniLM (Wang 2020, arXiv 2002.10957, section 3.1). mixtures: {projection_name(layer): [heads, teacher's heads]};
    where a layer has one, each of the teacher's heads is compared with a mixture of the student's, whose shares are the
    softmax over the student's heads. probabilities: of all layers, [B, N, T, S]. No gradient flows to the teacher's.
    """
    total, least = jnp.float32(0), jnp.finfo(jnp.float32).tiny
    for layer, teacher_layer in layers:
        q_BNTS, name = probabilities[layer], projection_name(layer)
        p_BNTS = lax.stop_gradient(teacher_probabilities[teacher_layer])
        if name in mixtures:
            shares = jax.nn.softmax(mixtures[name], axis=0)
            q_BNTS = jnp.einsum("BMTS,MN->BNTS", q_BNTS, shares)
        log_ratio = jnp.log(jnp.maximum(p_BNTS, least)) - jnp.log(jnp.maximum(q_BNTS, least))
        total = total + jnp.sum(weights_BT * jnp.mean(jnp.sum(p_BNTS * log_ratio, axis=-1), axis=1))
    return total


def projection_name(layer: int) -> str:
    """The name of the matrix that the student's layer has among those of HIDDEN_PROJECTION or of HEAD_MIXTURE."""
    return f"block_{layer}"


def sums_against(
    config: ModelConfig,
    model: tuple[Any, jax.Array],
    reference: tuple[Any, jax.Array],
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the weighted targets, in nats: of the cross-entropy and of KL(reference || model); and of the weights.

    model, reference: params that hold the output layer, and the final states [B, T, D] that it reads, for a batch that
    has targets and segments.
    """
    weights_BT = target_weights(batch)
    outputs = [(x_BTD, _reader(params, config), config.tied) for params, x_BTD in (model, reference)]
    how = {"temperature": 1.0, "share": 1.0} | _of_logits(config, config)
    _, kl, nll = ops.distillation(*outputs, batch["targets"], weights_BT, **how)
    return nll, kl, jnp.sum(weights_BT)


def target_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """The weight of every target, float32 [B, T]: the batch's own "weights" if it has any, and 0.0 on padding."""
    real_BT = (batch["segments"] > 0).astype(jnp.float32)
    return real_BT * batch["weights"].astype(jnp.float32) if "weights" in batch else real_BT


def _final_states(
    model: Transformer, params: Any, batch: dict[str, jax.Array], outputs: bool = False, probabilities: bool = False
) -> tuple[tuple[jax.Array, Any, bool], Gathered]:
    """Final states [B, T, D] of a batch of `data.packing`, the output layer that reads them and whether it is tied; and
    what is asked for of all layers."""
    x_BTD, found = final_states_and_gathered(
        model, params, **_inputs(batch), outputs=outputs, probabilities=probabilities
    )
    return (x_BTD, _reader(params, model.config), model.config.tied), found


def _inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"tokens": batch["inputs"], "segments": batch["segments"], "positions": batch["positions"]}


def _reader(params: Any, config: ModelConfig) -> Any:
    """The output layer's weight."""
    return params["embedding" if config.tied else "unembedding"]


def _of_logits(student: ModelConfig, teacher: ModelConfig) -> dict[str, Any]:
    """What ops.distillation has to know of the logits of both."""
    return {"unused": (student.unused, teacher.unused), "caps": (student.logit_cap, teacher.logit_cap)}


def _mean_over_tokens(sums: Callable[..., dict[str, jax.Array]]) -> LossFn:
    """The loss whose weighted sums are sums(trainable, frozen, batch, weights_BT): "loss", and what else it reports."""

    def loss_fn(trainable: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array):
        del rng
        weights_BT = target_weights(batch)
        weight = jnp.sum(weights_BT)
        summed = sequence_parallel.summed_over_shards(sums)
        means = weighted_mean(summed(trainable, frozen, batch, weights_BT), weight)
        return means.pop("loss"), means | {"weight": weight}

    return loss_fn
