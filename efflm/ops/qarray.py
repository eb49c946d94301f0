"""QArray: an int8 matrix with one scale per output channel, and its plain form for files."""

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from efflm import trees

Activations = Literal["float", "int8"]


@flax.struct.dataclass
class QArray:
    """A matrix w ~ values * scale.

    values: int8, the shape of w, within [-127, 127]. scale: floating, the shape of w with the contracted axis
    reduced to 1. activations: "float" multiplies in floating point (W8A16), "int8" quantizes the other operand row
    by row as well (W8A8). For every element |w - values * scale| <= scale / 2, and an exact zero stays one.
    """

    values: jax.Array
    scale: jax.Array
    activations: Activations = flax.struct.field(pytree_node=False, default="float")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


def _absmax_scale(x: jax.Array, axis: int) -> jax.Array:
    absmax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=True)
    return jnp.where(absmax > 0, absmax / 127, 1.0)


def round_to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax rounding: int8 values and a float32 scale for each slice along `axis` (kept, size 1)."""
    scale = _absmax_scale(x, axis)
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8), scale


def quantize_array(w: jax.Array, axis: int, activations: Activations = "float") -> QArray:
    """Round a float matrix to int8, one scale for each slice along the contracted `axis`; w keeps its dtype in it."""
    values, scale = round_to_int8(w, axis)
    return QArray(values, scale.astype(w.dtype), activations)


def dequantize(w: Any) -> jax.Array:
    """The float matrix a weight stands for."""
    if isinstance(w, QArray):
        return (w.values.astype(jnp.float32) * w.scale.astype(jnp.float32)).astype(w.scale.dtype)
    return w


def contracted_axis(w: QArray) -> int:
    """The axis over which w has one scale."""
    return next((axis for axis in range(w.ndim) if w.scale.shape[axis] == 1 != w.shape[axis]), 0)


def requantize(master: jax.Array, like: Any) -> Any:
    """A float master in the format of the weight `like`."""
    if not isinstance(like, QArray):
        return master.astype(like.dtype)
    return quantize_array(master.astype(like.scale.dtype), contracted_axis(like), like.activations)


def straight_through(master: jax.Array, like: Any) -> jax.Array:
    """Forward: `master` rounded to the format of `like`. Backward: the identity (Bengio 2013, arXiv 1308.3432)."""
    if not isinstance(like, QArray) and like.dtype == master.dtype:
        return master
    rounded = dequantize(requantize(master, like)).astype(master.dtype)
    return master + jax.lax.stop_gradient(rounded - master)


def to_flat(params: Any) -> tuple[dict[str, jax.Array], dict[str, dict[str, str]]]:
    """{path: array} with compressed weights opened, and {path: kind} from which `from_flat` rebuilds them."""
    kinds = {
        path: {"kind": "qarray", "activations": leaf.activations}
        for path, leaf in trees.flatten(params)
        if isinstance(leaf, QArray)
    }
    return dict(trees.flatten(params, inside=True)), kinds


def from_flat(flat: dict[str, Any], kinds: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The inverse of `to_flat`."""
    flat = dict(flat)
    for path, kind in kinds.items():
        flat[path] = QArray(flat.pop(f"{path}/values"), flat.pop(f"{path}/scale"), kind["activations"])
    return trees.unflatten(flat)
