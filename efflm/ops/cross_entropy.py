"""Next-token cross-entropy from the final states, without the [B, T, V] logits (see ops.output_loss)."""

from typing import Any

import jax
import jax.numpy as jnp

from efflm.ops.output_loss import capped, output_loss
from efflm.ops.qarray import operands


def cross_entropy(
    x_BTD: jax.Array,
    w: Any,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    tied: bool,
    cap: float = 0.0,
    z_weight: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens, in nats: of weight * (nll + z_weight * log_normalizer^2), and of weight * nll.

    w: [D, V], or [V, D] with `tied`; matmuls are in the dtype of x. cap: of the logits, a soft one (0: none). The
    square keeps the normalizer near 1 ("z-loss", Chowdhery 2022, arXiv 2204.02311, section 5). Gradients flow from the
    first sum only, to x and w.
    """
    x_BTD, w = operands(x_BTD, w)

    def chunk_loss(logits_MV, tokens, shared):
        del shared
        targets_M, weights_M = tokens
        nll_M, normalizer_M, hit_MV = target_nll(logits_MV, targets_M)
        loss = jnp.sum(weights_M * (nll_M + z_weight * jnp.square(normalizer_M)))
        slope_M = weights_M * (1 + 2 * z_weight * normalizer_M)
        softmax_MV = jnp.exp(logits_MV - normalizer_M[:, None]) * slope_M[:, None]
        return (loss, jnp.sum(weights_M * nll_M)), softmax_MV - jnp.where(hit_MV, weights_M[:, None], 0.0)

    tokens = targets_BT, weights_BT.astype(jnp.float32)
    return output_loss(capped(chunk_loss, cap), tied, x_BTD, w, tokens, None)


def target_nll(logits_MV: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p(target) and log-normalizers, float32 [M], and which of the logits are the targets', bool [M, V]."""
    normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
    hit_MV = jnp.arange(logits_MV.shape[1], dtype=targets_M.dtype)[None] == targets_M[:, None]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        chosen_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    else:  # another 5% of a step, but the partitioner cannot look up in a vocabulary that is spread over devices
        chosen_M = jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1)
    return normalizer_M - chosen_M, normalizer_M, hit_MV
