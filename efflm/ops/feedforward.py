"""The gated feed-forward part of a layer: SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from efflm.ops.dot import dot, dots
from efflm.ops.kernels.cpu import dot as cpu
from efflm.ops.recompute import recomputed

Activation = Literal["silu", "gelu_tanh"]  # of the gate; the second is a GELU's tanh form
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def gated(gate: jax.Array, up: jax.Array, activation: Activation, dtype: Any) -> jax.Array:
    """activation(gate) * up in `dtype`."""
    return recomputed(lambda gate, up: (ACTIVATIONS[activation](gate) * up).astype(dtype))(gate, up)


def gated_feedforward(
    x: Any,
    gate: Any,
    up: Any,
    down: Any,
    residual: jax.Array | None,
    dtype: Any,
    place: Callable[[jax.Array], jax.Array] = lambda h: h,
    *,
    activation: Activation = "silu",
) -> jax.Array:
    """residual + (activation(x gate) * (x up)) down, float32 [..., D], for x [..., D], an array or Normed.

    What `down` reads is in `dtype`; `place` puts it on a mesh.
    """
    out = cpu.feedforward(x, gate, up, down, residual, dtype, activation)
    if out is not None:
        return out
    return dot(place(gated(*dots(x, (gate, up)), activation, dtype)), down, residual)
