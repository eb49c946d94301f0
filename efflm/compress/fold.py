"""Scaling what a linear layer reads, input by input, without changing what the model computes.

x W = (x / s) (s W): W takes s, and what makes x takes 1 / s (MAKERS). Heads share the scales of their key-value head.
The up matrix makes what the down matrix reads only in a gated layer, where the product with the gate is linear in it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress.calibrate import SUBLAYERS
from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import norms
from efflm.model.params import table
from efflm.ops.qarray import QArray

MAKERS = ("attention_norm", "attention/value", "feedforward_norm", "feedforward/up")  # of what each of SUBLAYERS reads
LAST = ("attention/output", "attention/output", "feedforward/down", "feedforward/down")  # in the part that each is in


@dataclasses.dataclass(frozen=True)
class Place:
    """Where inputs can be scaled. readers: paths in the layer of the matrices that read them; maker: path of what makes
    them, a norm or a matrix, and the name of its kind of weights; last: path of the matrix whose output is that of the
    part of the layer that they are in."""

    readers: tuple[str, ...]
    maker: str
    last: str

    @property
    def is_norm(self) -> bool:
        return self.maker.endswith("_norm")


def places(config: ModelConfig) -> tuple[Place, ...]:
    """Of a layer. A parallel layer has them too: each of its norms is read by one part."""
    there, found = table(config), []
    for names, maker, last in zip(SUBLAYERS, MAKERS, LAST, strict=True):
        readers = tuple(f"{name}/kernel" for name in names if f"block_0/{name}/kernel" in there)
        # Of a mixture of experts the router, which must not change, reads the norm too: it has no readers here.
        if readers and (maker != "feedforward/up" or config.gated):
            found.append(Place(readers, maker, f"{last}/kernel"))
    return tuple(found)


def shared(config: ModelConfig, place: Place, s: jax.Array) -> jax.Array:
    """s [K] made so that the maker can take it: what heads that share a key-value head have, one for all of them."""
    if place.maker != "attention/value":
        return s
    (block,) = config.blocks
    by_head = s.reshape(block.kv_heads, block.heads // block.kv_heads, block.head_dim)
    return jnp.broadcast_to(jnp.max(by_head, axis=1, keepdims=True), by_head.shape).reshape(-1)


def scale_inputs(config: ModelConfig, params: Any, place: Place, s: jax.Array) -> Any:
    """The weights of a layer with the inputs of a place divided by s [K], as `shared` made it, and the rest made good.

    config: of a model with this layer alone. Raises InputError for quantized matrices, which would be rounded anew.
    """
    flat = dict(trees.flatten(params))
    for path in place.readers:
        require(
            not isinstance(flat[path], QArray), f"{path} is quantized already: scale its inputs before it is rounded"
        )
        flat[path] = (flat[path].astype(jnp.float32) * s[:, None]).astype(flat[path].dtype)
    inverse = 1.0 / s
    if place.maker == "attention/value":
        (block,) = config.blocks
        inverse = inverse.reshape(block.kv_heads, -1, block.head_dim)[:, 0].reshape(-1)
    for name in ("scale", "bias") if place.is_norm else ("kernel", "bias"):
        path = f"{place.maker}/{name}"
        if path in flat:
            w = ops.dequantize(flat[path])
            row, new = inverse if w.ndim == 1 else inverse[None], w.astype(jnp.float32)
            new = norms.stored(config, norms.effective(config, new) * row) if name == "scale" else new * row
            flat[path] = new.astype(w.dtype)
    return trees.unflatten(flat)
