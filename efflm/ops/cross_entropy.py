"""Next-token cross-entropy from the last hidden states, without the [B, T, V] logits.

The tokens are read in chunks. Where a gradient is wanted, each chunk's is made while its logits are there, so nothing
is computed twice: three products, as in the plain form, and one chunk of logits at a time. Everything but the
products' operands is float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.dot import matmul, weight_gradient
from efflm.ops.qarray import dequantize

CHUNK = 512  # tokens whose logits are held at a time, while that takes no more chunks than
MOST_CHUNKS = 16  # since every chunk reads and writes the whole gradient of the weight


def cross_entropy(
    x_BTD: jax.Array, w: Any, targets_BT: jax.Array, weights_BT: jax.Array, *, tied: bool, z_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens, in nats: of weight * (nll + z_weight * log_normalizer^2), and of weight * nll.

    w: [D, V], or [V, D] with `tied`; products are in the dtype of x. The square keeps the normalizer near 1 ("z-loss",
    Chowdhery 2022, arXiv 2204.02311, section 5). Gradients flow from the first sum only, to x and w.
    """
    total, nll = _cross_entropy(x_BTD, dequantize(w), targets_BT, weights_BT, tied, z_weight)
    return total, lax.stop_gradient(nll)


def chunk_count(B: int, T: int) -> int:
    """Into how many chunks along T the tokens are cut."""
    return max(1, min(MOST_CHUNKS, T, B * T // CHUNK))


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array):
    """Cut along T, since B may be spread over devices: [chunks, B * t, ...] each, padded with weight 0."""
    B, T = targets_BT.shape
    count = chunk_count(B, T)

    def cut(a):
        padded = jnp.pad(a, [(0, 0), (0, -T % count)] + [(0, 0)] * (a.ndim - 2))
        return padded.reshape(B, count, -1, *a.shape[2:]).swapaxes(0, 1).reshape(count, -1, *a.shape[2:])

    return cut(x_BTD), cut(targets_BT), cut(weights_BT.astype(jnp.float32))


def _values(x_MD, w, targets_M, weights_M, tied, z_weight):
    """Of one chunk: logits, log-normalizers, which logits are the targets', and the two sums."""
    logits_MV = matmul(x_MD, w, tied)
    normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
    hit_MV = jnp.arange(logits_MV.shape[1], dtype=targets_M.dtype)[None] == targets_M[:, None]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        chosen_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    else:  # another 5% of a step, but the partitioner cannot look up in a vocabulary that is spread over devices
        chosen_M = jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1)
    nll_M = normalizer_M - chosen_M
    loss = jnp.sum(weights_M * (nll_M + z_weight * jnp.square(normalizer_M)))
    return logits_MV, normalizer_M, hit_MV, (loss, jnp.sum(weights_M * nll_M))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_BTD, w, targets_BT, weights_BT, tied, z_weight):
    w = w.astype(x_BTD.dtype)

    def one(sums, chunk):
        x_MD, targets_M, weights_M = chunk
        return jax.tree.map(jnp.add, sums, _values(x_MD, w, targets_M, weights_M, tied, z_weight)[3]), None

    zero = jnp.zeros((), jnp.float32)
    return lax.scan(one, (zero, zero), _chunks(x_BTD, targets_BT, weights_BT))[0]


def _forward(x_BTD, w, targets_BT, weights_BT, tied, z_weight):
    low = w.astype(x_BTD.dtype)

    def one(carry, chunk):
        sums, dw = carry
        x_MD, targets_M, weights_M = chunk
        logits_MV, normalizer_M, hit_MV, new = _values(x_MD, low, targets_M, weights_M, tied, z_weight)
        slope_M = weights_M * (1 + 2 * z_weight * normalizer_M)
        softmax_MV = jnp.exp(logits_MV - normalizer_M[:, None]) * slope_M[:, None]
        dlogits_MV = (softmax_MV - jnp.where(hit_MV, weights_M[:, None], 0.0)).astype(x_MD.dtype)
        dx_MD = matmul(dlogits_MV, low, not tied).astype(x_MD.dtype)
        dw = dw + (weight_gradient(dlogits_MV, x_MD) if tied else weight_gradient(x_MD, dlogits_MV))
        return (jax.tree.map(jnp.add, sums, new), dw), dx_MD

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jnp.zeros(w.shape, jnp.float32))
    (sums, dw), dx = lax.scan(one, start, _chunks(x_BTD, targets_BT, weights_BT))
    B, T, D = x_BTD.shape
    dx_BTD = dx.reshape(dx.shape[0], B, -1, D).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return sums, (dx_BTD, dw.astype(w.dtype))


def _backward(tied, z_weight, residuals, cotangents):
    dx_BTD, dw = residuals
    scaled = lambda gradient: (gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype)
    return scaled(dx_BTD), scaled(dw), None, None


_cross_entropy.defvjp(_forward, _backward)
