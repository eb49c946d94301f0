"""The gated feed-forward part of a layer: SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable
from typing import Any

import jax

from efflm.ops.dot import dot, dots
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.recompute import recomputed


def swiglu(gate: jax.Array, up: jax.Array, dtype: Any) -> jax.Array:
    """silu(gate) * up in `dtype`."""
    return recomputed(lambda gate, up: (jax.nn.silu(gate) * up).astype(dtype))(gate, up)


def gated_feedforward(
    x: Any,
    gate: Any,
    up: Any,
    down: Any,
    residual: jax.Array,
    dtype: Any,
    place: Callable[[jax.Array], jax.Array] = lambda h: h,
) -> jax.Array:
    """residual + (silu(x gate) * (x up)) down, float32 [..., D], for x [..., D], an array or Normed.

    What `down` reads is in `dtype`; `place` puts it on a mesh.
    """
    out = cpu.feedforward(x, gate, up, down, residual, dtype)
    if out is not None:
        return out
    return dot(place(swiglu(*dots(x, (gate, up)), dtype)), down, residual)
