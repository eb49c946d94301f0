"""Losses of the output layer, from the final states, in chunks of tokens: the [B, T, V] logits never exist.

Where a gradient is wanted, each chunk's is computed while its logits are there, so that nothing is computed twice:
three matmuls, as in the plain form, and one chunk of logits at a time. Only the operands of matmuls are not float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efflm.ops.dot import matmul, weight_gradient
from efflm.ops.soft_cap import slope, soft_cap

CHUNK = 512  # tokens whose logits are held at a time, while that takes no more chunks than
MOST_CHUNKS = 16  # since every chunk reads and writes the whole gradient of the weight

# chunk_loss(logits_MV, tokens, shared) -> (float32 sums over the chunk's tokens, gradient [M, V] of the first of them)
ChunkLoss = Callable[[jax.Array, Any, Any], tuple[tuple[jax.Array, ...], jax.Array]]


def capped(chunk_loss: ChunkLoss, cap: float) -> ChunkLoss:
    """The loss of logits with a soft cap (0: none), as one of those without."""
    if not cap:
        return chunk_loss

    def of_raw(logits_MV, tokens, shared):
        logits_MV = soft_cap(logits_MV, cap)
        sums, dlogits_MV = chunk_loss(logits_MV, tokens, shared)
        return sums, dlogits_MV * slope(logits_MV, cap)

    return of_raw


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def output_loss(
    chunk_loss: ChunkLoss, tied: bool, x_BTD: jax.Array, w: jax.Array, tokens: Any, shared: Any
) -> tuple[jax.Array, ...]:
    """The sums of `chunk_loss` over all tokens. Gradients flow from the first sum only, to x and w only.

    w: [D, V], or [V, D] with `tied`; matmuls are in the dtype of x. tokens: a tree of arrays [B, T, ...], of which
    chunk_loss is given those of its chunk, [M, ...], with zeros as padding. shared: a tree that it is given whole.
    """
    w = w.astype(x_BTD.dtype)

    def one(_, chunk):
        x_MD, of_chunk = chunk
        return None, chunk_loss(matmul(x_MD, w, tied), of_chunk, shared)[0]

    return _total(lax.scan(one, None, _chunks((x_BTD, tokens)))[1])


def chunk_count(B: int, T: int) -> int:
    """How many chunks the tokens [B, T] are cut into. Cut along T, since B may be spread over devices."""
    return max(1, min(MOST_CHUNKS, T, B * T // CHUNK))


def _total(sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return jax.tree.map(jnp.sum, sums)


def _chunks(tree: Any) -> Any:
    """Every array [B, T, ...] as [chunks, B * t, ...], padded with zeros."""
    B, T = jax.tree.leaves(tree)[0].shape[:2]
    count = chunk_count(B, T)

    def cut(a):
        padded = jnp.pad(a, [(0, 0), (0, -T % count)] + [(0, 0)] * (a.ndim - 2))
        return padded.reshape(B, count, -1, *a.shape[2:]).swapaxes(0, 1).reshape(count, -1, *a.shape[2:])

    return jax.tree.map(cut, tree)


def _forward(chunk_loss, tied, x_BTD, w, tokens, shared):
    low = w.astype(x_BTD.dtype)

    def one(dw, chunk):
        x_MD, of_chunk = chunk
        sums, dlogits_MV = chunk_loss(matmul(x_MD, low, tied), of_chunk, shared)
        dlogits_MV = dlogits_MV.astype(x_MD.dtype)
        dx_MD = matmul(dlogits_MV, low, not tied).astype(x_MD.dtype)
        dw = dw + (weight_gradient(dlogits_MV, x_MD) if tied else weight_gradient(x_MD, dlogits_MV))
        return dw, (sums, dx_MD)

    dw, (sums, dx) = lax.scan(one, jnp.zeros(w.shape, jnp.float32), _chunks((x_BTD, tokens)))
    B, T, D = x_BTD.shape
    dx_BTD = dx.reshape(dx.shape[0], B, -1, D).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return _total(sums), (dx_BTD, dw.astype(w.dtype))


def _backward(chunk_loss, tied, gradients, cotangents):
    del chunk_loss, tied
    dx_BTD, dw = ((gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype) for gradient in gradients)
    return dx_BTD, dw, None, None


output_loss.defvjp(_forward, _backward)
