"""Distillation's loss from the final states of the student, and from those of the teacher or from what was kept of its
distributions, without the [B, T, V] logits of either."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.cross_entropy import target_nll
from efflm.ops.divergences import DIVERGENCES, Divergence
from efflm.ops.dot import matmul
from efflm.ops.output_loss import capped, output_loss
from efflm.ops.possible import LEAST, Ranges, possible
from efflm.ops.qarray import operands
from efflm.ops.soft_cap import soft_cap


def distillation(
    student: tuple[jax.Array, Any, bool],
    teacher: tuple[jax.Array, Any, bool],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    temperature: float,
    share: float,
    divergence: Divergence = "forward",
    mix: float = 0.5,
    unused: tuple[Ranges, Ranges] = ((), ()),
    caps: tuple[float, float] = (0.0, 0.0),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over all tokens, in nats: of weight * (share * d + (1 - share) * nll), of weight * d, of weight * nll.

    d = temperature^2 * divergence of teacher and student, both softened by the temperature (Hinton 2015, arXiv
    1503.02531, section 2). divergence, mix: see `divergences`; only those of a mixture read mix. student and teacher:
    (final states [B, T, width], output layer, whether it is tied), as x, w and tied of `cross_entropy`; they share the
    tokens and nothing else. unused: ids that have none, of the student and of the teacher: d is of the others. caps:
    soft ones, of the student's and of the teacher's logits.
    Gradients flow from the first sum only, to the student only.
    """
    x_BTD, w, tied = student
    teacher_x_BTE, teacher_w, teacher_tied = teacher
    x_BTD, w = operands(x_BTD, w)
    teacher_x_BTE, teacher_w = lax.stop_gradient(operands(teacher_x_BTE, teacher_w))
    teacher_w = teacher_w.astype(teacher_x_BTE.dtype)

    def chunk_loss(logits_MV, tokens, teacher_w):
        targets_M, weights_M, teacher_x_ME = tokens
        teacher_MV = soft_cap(matmul(teacher_x_ME, teacher_w, teacher_tied), caps[1])
        teacher_MV = possible(teacher_MV, unused[1], LEAST)
        log_p_MV = jax.nn.log_softmax(teacher_MV / temperature, axis=-1)

        def apart(logits_MV):
            log_q_MV = jax.nn.log_softmax(possible(logits_MV, unused[0], LEAST) / temperature, axis=-1)
            return temperature**2 * DIVERGENCES[divergence](log_p_MV, log_q_MV, mix)

        d_M, pull = jax.vjp(apart, logits_MV)
        nll_M, normalizer_M, hit_MV = target_nll(logits_MV, targets_M)
        sums = [jnp.sum(weights_M * values) for values in (share * d_M + (1 - share) * nll_M, d_M, nll_M)]
        of_nll_MV = jnp.exp(logits_MV - normalizer_M[:, None]) - hit_MV
        # The cross-entropy's by hand: the derivative of its lookup would scatter into an array [M, V].
        return tuple(sums), pull(share * weights_M)[0] + ((1 - share) * weights_M)[:, None] * of_nll_MV

    tokens = targets_BT, weights_BT.astype(jnp.float32), teacher_x_BTE
    return output_loss(capped(chunk_loss, caps[0]), tied, x_BTD, w, tokens, teacher_w)


def cached_distillation(
    student: tuple[jax.Array, Any, bool],
    p_BTK: jax.Array,
    ids_BTK: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    share: float,
    unused: Ranges = (),
    cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `distillation`, with d = KL(teacher || student) where of the teacher p_BTK is known: the probabilities of the
    tokens ids_BTK, which may be repeated, or of all (None; K = V, without padding). Of others it is taken to be 0."""
    x_BTD, w, tied = student
    x_BTD, w = operands(x_BTD, w)

    def chunk_loss(logits_MV, tokens, shared):
        del shared
        targets_M, weights_M, p_MK, *ids = tokens
        p_MK = p_MK.astype(jnp.float32)
        nll_M, normalizer_M, hit_MV = target_nll(logits_MV, targets_M)
        real_MV = possible(logits_MV, unused, LEAST)
        of_real_M = jax.nn.logsumexp(real_MV, axis=-1) if unused else normalizer_M
        chosen_MK, p_MV = _of_entries(real_MV, ids[0], p_MK) if ids else (real_MV, p_MK)
        log_q_MK = chosen_MK - of_real_M[:, None]
        d_M = jnp.sum(p_MK * (jnp.log(jnp.maximum(p_MK, jnp.finfo(jnp.float32).tiny)) - log_q_MK), axis=-1)
        sums = [jnp.sum(weights_M * values) for values in (share * d_M + (1 - share) * nll_M, d_M, nll_M)]
        q_MV = jnp.exp(logits_MV - normalizer_M[:, None])
        of_d_MV = jnp.sum(p_MK, axis=-1, keepdims=True) * jnp.exp(real_MV - of_real_M[:, None]) - p_MV
        of_d_MV = jnp.pad(of_d_MV, ((0, 0), (0, logits_MV.shape[1] - of_d_MV.shape[1])))
        return tuple(sums), (share * weights_M)[:, None] * of_d_MV + ((1 - share) * weights_M)[:, None] * (
            q_MV - hit_MV
        )

    tokens = (targets_BT, weights_BT.astype(jnp.float32), p_BTK, *(() if ids_BTK is None else (ids_BTK,)))
    return output_loss(capped(chunk_loss, cap), tied, x_BTD, w, tokens, None)


def _of_entries(logits_MV: jax.Array, ids_MK: jax.Array, p_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits [M, K] of the tokens ids_MK, and an array [M, V] with the sum of p_MK at each token."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        rows_M1 = jnp.arange(len(p_MK))[:, None]
        p_MV = jnp.zeros(logits_MV.shape, jnp.float32).at[rows_M1, ids_MK].add(p_MK)
        return jnp.take_along_axis(logits_MV, ids_MK, axis=-1), p_MV

    def one(p_MV, entry):  # slower, but XLA's partitioner cannot look up in a vocabulary that is spread over devices
        ids_M, p_M = entry
        hit_MV = jnp.arange(logits_MV.shape[1], dtype=ids_M.dtype)[None] == ids_M[:, None]
        return p_MV + jnp.where(hit_MV, p_M[:, None], 0.0), jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1)

    p_MV, chosen_KM = lax.scan(one, jnp.zeros(logits_MV.shape, jnp.float32), (ids_MK.T, p_MK.T))
    return chosen_KM.T, p_MV
