"""Structured pruning of layers: whole groups of heads and feed-forward channels go, so that matrices are smaller.

What a slice adds to the residual stream passes through the matrix that reads it. Slices that add least go (with
importance "activation" those with the smallest activations: Minitron, Muralidharan 2024, arXiv 2407.14679, section
2.2), and that matrix is fitted again to give what it gave, by least squares over the calibration text (as Frantar 2022,
arXiv 2208.11580, does for single weights).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress import calibrate, slicing
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.config import ModelConfig, flag, require
from efflm.model import LanguageModel
from efflm.model.params import table

# The matrix that reads the slices of an axis: its rows are theirs. The axis of weights (model.params) it contracts.
READERS = {"groups": ("attention/output/kernel", "heads"), "mlp": ("feedforward/down/kernel", "mlp")}
MULTIPLE = 16  # feed-forward channels are kept in multiples of it, which kernels are fast at, where there are many


def counts(config: ModelConfig, parameters: float, axes: tuple[str, ...]) -> list[dict[str, int]]:
    """How many slices each layer keeps along each axis, for a model without that share of its parameters.

    All layers and axes give the same share, as near as whole groups allow; the channels make up for the rest. Raises
    InputError for a share that cannot be reached.
    """
    total = sum(math.prod(param.shape) for param in table(config).values())
    have = [{axis: slicing.sizes(block)[axis] for axis in axes} for block in config.blocks]
    per_slice = [
        {axis: _parameters(config, index, axis) // size[axis] for axis in axes} for index, size in enumerate(have)
    ]
    every = list(zip(have, per_slice))
    whole = lambda axis: sum(each[axis] * size[axis] for size, each in every)
    most = sum(each[axis] * (size[axis] - _step(axis, size)) for size, each in every for axis in axes)
    target, names = parameters * total, " and ".join(axes)
    require(
        target <= most,
        f"parameters is {parameters}, but with the fewest {names} in each layer the model has "
        f"{most / total:.1%} fewer: ask for less",
    )
    kept, removed = [dict(size) for size in have], 0
    for index, axis in enumerate(axes):  # groups first
        share = (target - removed) / sum(map(whole, axes[index:]))
        for own, (size, each) in zip(kept, every):
            step = _step(axis, size)
            own[axis] = min(max(round(size[axis] * (1 - share) / step) * step, step), size[axis])
            removed += each[axis] * (size[axis] - own[axis])
    rounding = sum(each[axes[-1]] * _step(axes[-1], size) for size, each in every) / 2
    require(
        removed > 0 and removed >= target - rounding,
        f"parameters is {parameters}, but whole {names} make it {removed / total:.1%}: ask for another share",
    )
    return kept


def _step(axis: str, size: dict[str, int]) -> int:
    return MULTIPLE if axis == "mlp" and size[axis] >= MULTIPLE**2 else 1


def _parameters(config: ModelConfig, layer: int, axis: str) -> int:
    """Of the weights of a layer that have the axis."""
    names = {"groups": {"heads", "kv_heads"}, "mlp": {"mlp"}}[axis]
    weights = table(config).items()
    return sum(math.prod(p.shape) for path, p in weights if path.startswith(f"block_{layer}/") and names & set(p.axes))


@functools.partial(jax.jit, static_argnames="importance")
def scores(w: jax.Array, gram: jax.Array, importance: str) -> jax.Array:
    """Of each input of w float32 [K, N], [K]: the sum over tokens of the squared length of what it adds to the output,
    or of its square ("activation"), or the squared length of its weights ("magnitude"). gram: X^T X [K, K]."""
    squares, lengths = jnp.diag(gram), jnp.sum(jnp.square(w), axis=1)
    return {"output": squares * lengths, "activation": squares, "magnitude": lengths}[importance]


@jax.jit
def refit(w: jax.Array, gram: jax.Array, kept: jax.Array, gone: jax.Array, damping: jax.Array | float) -> jax.Array:
    """The rows `kept` of w [K, N] that give with their inputs alone what all gave, by least squares: [len(kept), N].

    damping: added to the diagonal of X^T X, as a share of its mean; so inputs that are always zero change nothing.
    """
    own = gram[kept][:, kept]
    own = own + damping * jnp.maximum(jnp.mean(jnp.diag(own)), 1e-20) * jnp.eye(len(kept))
    missing = jnp.matmul(gram[kept][:, gone], w[gone], precision="highest")
    return w[kept] + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(own), missing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneWidth:
    """Remove groups of heads and feed-forward channels of every layer, the rest compensating."""

    parameters: float = flag(0.3, "share of all parameters to remove, embeddings counted")
    axes: Literal["groups mlp", "groups", "mlp"] = flag(
        "groups mlp", "what may go: key-value heads with the query heads that read them, feed-forward channels"
    )
    importance: Literal["output", "activation", "magnitude"] = flag("output", "by what those that stay are chosen")
    refit: bool = flag(True, "fit the matrices that read them again")
    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean, for that")

    calibrates = True

    def __post_init__(self):
        require(0 < self.parameters < 1, f"parameters is {self.parameters}, but must be between 0 and 1")
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")

    def __call__(self, model: LanguageModel, context: Context):
        axes = tuple(self.axes.split())
        keep = counts(model.config, self.parameters, axes)

        def one(layer: Layer, read: calibrate.States) -> Layer:
            (block,), flat, chosen = layer.config.blocks, dict(trees.flatten(layer.params)), {}
            fitted: dict[str, Any] = {}
            for axis in axes:
                path, name = READERS[axis]
                w, gram = ops.dequantize(flat[path]).astype(jnp.float32), read[path]["gram"]
                size, count = slicing.sizes(block)[axis], keep[layer.index][axis]
                each = np.asarray(scores(w, gram, self.importance)).reshape(size, -1).sum(axis=1)
                chosen[axis] = np.sort(np.argsort(-each, kind="stable")[:count])
                inputs = slicing.features(block, chosen)[name]
                gone = np.setdiff1d(np.arange(len(w)), inputs)
                if self.refit and gone.size:
                    fitted[path] = refit(w, gram, inputs, gone, self.damping)
            along = slicing.features(block, chosen)
            cut = lambda path, leaf: slicing.sliced(f"block_0/{path}", leaf, along)
            params, masks = trees.map_with_path(cut, layer.params), {p: cut(p, mask) for p, mask in layer.masks.items()}
            made = lambda path, leaf: ops.requantize(fitted[path], leaf) if path in fitted else leaf
            params = ops.apply_masks(trees.map_with_path(made, params), masks)
            config = dataclasses.replace(layer.config, blocks=(slicing.sliced_block(block, chosen),))
            return layer.replace(params=params, masks=masks, config=config)

        after = calibrate.map_blocks(
            model, context.calibration, {"gram": calibrate.GRAM}, one, mesh=context.mesh, title="width pruning"
        )
        return after, record(self, model, after, context, uses_text=True)
