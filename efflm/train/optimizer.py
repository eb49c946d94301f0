"""Update rules and learning-rate schedules by name: one `make(config)` for every training run.

The rules come from optax where it has them; `adamw8bit` is ours. All run in float32. The best learning rates found by
experiments/optimizers.py lie within a factor of three of AdamW's, except that sgd wants thirty times as much.

    sgd            momentum `beta1` (Polyak 1964); no weight decay
    adam           Kingma 2014, arXiv 1412.6980; no weight decay
    adamw          decoupled weight decay (Loshchilov 2017, arXiv 1711.05101), of the matrices only, as in all below
    adamw8bit      AdamW whose moments are kept in 8 bits (Dettmers 2021, arXiv 2110.02861)
    lion           the sign of an interpolated momentum (Chen 2023, arXiv 2302.06675)
    adafactor      a factored second moment, no first (Shazeer 2018, arXiv 1804.04235; see `adafactor`)
    muon           orthogonalized momentum for the matrices in the layers (Jordan 2024; see `muon`)
    schedule_free  AdamW whose iterates are averaged in place of a decaying rate (Defazio 2024, arXiv 2405.15682)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from efflm import trees
from efflm.config.train import TrainConfig
from efflm.model.params import in_layer, is_stacked
from efflm.train.adamw8bit import scale_by_adam8bit

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024: the quintic that lifts small singular values fastest
MUON_RMS = 0.2  # of an update of AdamW, by measurement (Liu 2025, arXiv 2502.16982, section 2.2)


def make(config: TrainConfig, learning_rate: jax.Array | float | None = None) -> optax.GradientTransformation:
    """The update rule of `config`: the gradient clipped to its largest global norm, then the optimizer.

    learning_rate: the peak, in place of the config's. It may be traced, so that under `optax.inject_hyperparams` one
    compiled step serves any rate. Moments have the dtype of the parameters, float32 where train.step calls it.
    """
    peak = config.learning_rate if learning_rate is None else learning_rate
    return optax.chain(optax.clip_by_global_norm(config.clip), RULES[config.optimizer](config, peak))


def decay_mask(params: Any) -> Any:
    """True for the matrices that weight decay is applied to: all but embeddings, norms and biases."""
    return trees.map_with_path(lambda path, _: in_layer(path), params)


# --- learning rates ------------------------------------------------------------------------------------------------


def schedule(config: TrainConfig, peak: jax.Array | float | None = None) -> optax.Schedule:
    """step -> learning rate: linear warm-up from 0 to the peak, then what `config.schedule` says.

    cosine and linear fall to final_fraction of the peak when config.steps steps are done; wsd (Hu 2024, arXiv
    2404.06395) holds the peak and falls linearly over the last decay_steps; constant holds it to the end.
    """
    peak = config.learning_rate if peak is None else peak
    end, rest = peak * config.final_fraction, config.steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "wsd":
        decay = optax.linear_schedule(peak, end, config.decay_steps)
        after = optax.join_schedules([optax.constant_schedule(peak), decay], [rest - config.decay_steps])
    else:
        after = optax.constant_schedule(peak)
    return warmed_up(after, peak, config.warmup_steps)


def warmed_up(after: optax.Schedule, peak: jax.Array | float, steps: int) -> optax.Schedule:
    """`after`, preceded by `steps` steps of a rate that rises linearly from 0 to the peak."""
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), after], [steps]) if steps else after


def rate(config: TrainConfig) -> optax.Schedule:
    """step -> the learning rate that `make(config)` has, counted from 0."""
    if config.optimizer != "schedule_free":
        return schedule(config)
    return warmed_up(optax.constant_schedule(config.learning_rate), config.learning_rate, config.warmup_steps)


# --- update rules: (config, peak learning rate) -> transformation --------------------------------------------------


def sgd(config: TrainConfig, peak) -> optax.GradientTransformation:
    return optax.chain(optax.trace(config.beta1), optax.scale_by_learning_rate(schedule(config, peak)))


def adam(config: TrainConfig, peak) -> optax.GradientTransformation:
    return optax.adam(schedule(config, peak), b1=config.beta1, b2=config.beta2)


def decoupled(direction: optax.GradientTransformation, config: TrainConfig, peak) -> optax.GradientTransformation:
    """w <- w - rate * (direction + weight_decay * w), the second term for the matrices only."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(config, peak)),
    )


def adamw(config: TrainConfig, peak) -> optax.GradientTransformation:
    return decoupled(optax.scale_by_adam(config.beta1, config.beta2), config, peak)


def adamw8bit(config: TrainConfig, peak) -> optax.GradientTransformation:
    return decoupled(scale_by_adam8bit(config.beta1, config.beta2), config, peak)


def lion(config: TrainConfig, peak) -> optax.GradientTransformation:
    return decoupled(optax.scale_by_lion(config.beta1, config.beta2), config, peak)


def adafactor(config: TrainConfig, peak) -> optax.GradientTransformation:
    """Adafactor without momentum and with absolute steps, so that it takes AdamW's learning rates.

    The relative steps of the paper's section 8 are left out. Its second moment decays by 1 - t^-0.8 (section 7), so
    neither `beta1` nor `beta2` is read. optax factors over the two largest axes where both have 128 entries or more:
    those of the matrix, and not a stacked tree's layer axis, unless there are more layers than rows or columns. The
    clipping of an update to an RMS of 1 (section 6) is taken over a whole leaf, and so over each layer on its own.
    """
    clip = lambda u: u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(u))))

    def clipped(path, u):
        return jax.vmap(clip)(u) if is_stacked(path) else clip(u)

    clipping = optax.stateless(lambda updates, _: trees.map_with_path(clipped, updates))
    return decoupled(optax.chain(optax.scale_by_factored_rms(), clipping), config, peak)


def muon(config: TrainConfig, peak) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embeddings, unembedding, norms and biases.

    The momentum (`beta1`, Nesterov; the paper has 0.95) of a matrix [in, out] is orthogonalized by five steps of
    Newton-Schulz; a leading layer axis is a batch. An orthogonal update has an RMS of 1 / sqrt(max(in, out)), so it is
    scaled by 0.2 sqrt(max(in, out)) (Liu 2025, section 2.2) to share AdamW's learning rates and weight decay.
    """

    def labels(params):
        return trees.map_with_path(lambda path, _: "muon" if in_layer(path) else "adamw", params)

    rescale = lambda u: u * MUON_RMS * max(u.shape[-2:]) ** 0.5
    orthogonal = optax.chain(
        scale_by_muon(config.beta1), optax.stateless(lambda updates, _: jax.tree.map(rescale, updates))
    )
    rules = {"muon": decoupled(orthogonal, config, peak), "adamw": adamw(config, peak)}
    return optax.partition(rules, labels)


def scale_by_muon(beta: float) -> optax.GradientTransformation:
    """optax's Muon over the last two axes. Its coefficients are no part of the state: no sharding rule knows them."""

    def last_two(tree):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree)

    inner = contrib.scale_by_muon(NEWTON_SCHULZ, beta=beta, weight_dimension_numbers=last_two)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state._replace(ns_coeffs=jnp.asarray(NEWTON_SCHULZ)), params)
        return updates, state._replace(ns_coeffs=())

    return optax.GradientTransformation(lambda params: inner.init(params)._replace(ns_coeffs=()), update)


def schedule_free(config: TrainConfig, peak) -> optax.GradientTransformation:
    """AdamW without momentum, whose iterates z are averaged into x; the gradient is taken at y between the two.

    The rate is warmed up and then constant: `config.schedule`, `decay` and `final_fraction` are not read. `beta1` is
    the place of y between z (0) and x (1). What is trained is y; what is to be evaluated is x: `evaluation_params`.
    """
    rate = warmed_up(optax.constant_schedule(peak), peak, config.warmup_steps)
    base = optax.chain(
        optax.scale_by_rms(config.beta2, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate),
    )
    return contrib.schedule_free(base, rate, b1=config.beta1)


RULES = {rule.__name__: rule for rule in (sgd, adam, adamw, adamw8bit, lion, adafactor, muon, schedule_free)}


def evaluation_params(state: Any, trainable: Any) -> Any:
    """What to evaluate and keep: Schedule-Free's averaged parameters if its state is anywhere in `state`, else
    `trainable` itself."""
    is_found = lambda node: isinstance(node, contrib.ScheduleFreeState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_found) if is_found(node)]
    if not found:
        return trainable
    averaged = contrib.schedule_free_eval_params(found[0], trainable)
    return jax.tree.map(lambda x, w: x.astype(w.dtype), averaged, trainable)


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> float:
    """Bytes of optimizer state a parameter; nothing is allocated, and `params` may be abstract."""
    return trees.nbytes(jax.eval_shape(optimizer.init, params)) / trees.count(params)
