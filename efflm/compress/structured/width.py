"""Structured pruning of widths: groups of heads, feed-forward channels and channels of the residual stream go whole.

Slices inside the layers go by what they add to the residual stream, by their activations (Minitron, Muralidharan 2024,
arXiv 2407.14679, section 2.2), their weights, or a Taylor expansion of the loss (see importance). The matrix that reads
them is fitted again to give what it gave, by least squares over the calibration text (as Frantar 2022, arXiv
2208.11580, does for single weights). Channels of the residual stream go by Minitron's importance (see residual).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, Record, record
from efflm.compress.structured import allocation, importance, residual, slicing
from efflm.compress.structured.allocation import Counts, Scores
from efflm.compress.structured.importance import Importance
from efflm.compress.structured.target import Target
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.ops import qarray

WIDTH = slicing.WIDTH
# How near a target by bytes or by time is to be met, and by how many candidates at most.
NEAR = {"bytes": {"tolerance": 0.001, "candidates": 16}, "latency": {"tolerance": 0.02, "candidates": 8}}


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
class Width(Target):
    """Remove groups of heads, feed-forward channels, channels of the residual stream; the rest of a layer compensates.

    One target is set. By bytes and by latency, models with different shares of the parameters are tried, and the one
    nearest to the target is made: within 0.1% of the bytes of at most 16, within 2% of the time of at most 8.
    """

    axes: Literal["groups mlp", "groups", "mlp", "width", "groups mlp width"] = flag(
        "groups mlp",
        "what may go: key-value heads with the query heads that read them, feed-forward channels, channels of the "
        "residual stream",
    )
    importance: Importance = flag("output", "by what the groups and feed-forward channels that stay are chosen")
    layers: Literal["uniform", "ranked"] = flag(
        "uniform", "every layer gives the same share, or of each axis the least important slices of all layers go"
    )
    refit: bool = flag(True, "fit the matrices that read groups and feed-forward channels again")
    damping: float = flag(0.01, "added to the diagonal of X^T X, as a share of its mean, for that")

    at = "parameters"
    calibrates = True

    def __post_init__(self):
        super().__post_init__()
        targets = ", ".join(f"{name} is {getattr(self, name)}" for name in ("parameters", "bytes", "latency"))
        require(len(self.given) == 1, f"{targets}: set one of them, the others to 0")
        require(self.damping > 0, f"damping is {self.damping}, but must be positive: 0.01")
        require(
            self.layers == "uniform" or self.importance in ("output", "taylor"),
            f"layers is ranked, but importance by {self.importance} does not compare between layers: choose output or "
            "taylor",
        )
        require(
            self.layers == "uniform" or self.axes != WIDTH,
            "layers is ranked, but axes is width, which all layers share: choose uniform",
        )

    def __call__(self, model: LanguageModel, context: Context) -> tuple[LanguageModel, Record]:
        rows, mesh, axes = context.calibration, context.mesh, tuple(self.axes.split())
        inside = tuple(axis for axis in axes if axis != WIDTH)
        require(
            not any(block.experts for block in model.config.blocks),
            "the model is a mixture of experts, whose widths are not pruned: use depth, wanda or sparsegpt",
        )
        if self.parameters:
            allocation.require_possible(model.config, self.parameters, axes)
        channels = residual.channels(model, rows, mesh) if WIDTH in axes else np.zeros(model.config.width)
        scores = self.scores(model, context, inside)
        ranks = scores if self.layers == "ranked" else None

        def candidate(width: int, keep: Counts) -> LanguageModel:
            each = {(i, axis): (scores[i, axis], n) for i, own in enumerate(keep) for axis, n in own.items()}
            each |= {(None, WIDTH): (channels, width)} if WIDTH in axes else {}
            return slicing.slice_params(model, {key: importance.largest(*one) for key, one in each.items()})

        removed: dict[str, float] = {}
        if self.parameters:
            width, keep = allocation.counts(model.config, self.parameters, axes, ranks)
        else:
            share, removed = self.searched(model, axes, ranks, candidate)
            width, keep = allocation.sizes_within(model.config, share, axes, ranks)
        after = model
        if WIDTH in axes:
            after = residual.narrowed(after, importance.largest(channels, width), rows, mesh)
        if inside:
            after = self.pruned(after, context, keep, scores)
        return after, record(self, model, after, context, removed=removed)

    def scores(self, model: LanguageModel, context: Context, inside: tuple[str, ...]) -> Scores | None:
        """Of the slices of the whole model; None where those of each layer are enough, fed by what is made of the ones
        before it."""
        if not inside or (self.layers == "uniform" and self.parameters and self.importance != "taylor"):
            return None
        if self.importance == "taylor":
            return importance.taylor(model, context.calibration, context.mesh, inside)
        return importance.measured(model, context.calibration, context.mesh, inside, self.importance)

    def searched(
        self,
        model: LanguageModel,
        axes: tuple[str, ...],
        ranks: Scores | None,
        candidate: Callable[[int, Counts], LanguageModel],
    ) -> tuple[float, dict[str, float]]:
        """The share of the parameters that meets a target by bytes or latency, and what is then found to go of each."""
        ((name, target),), measure = self.given.items(), self.saving(model)
        known: dict[str, float] = {}  # several shares can be the same widths

        def removed(share: float) -> float:
            width, keep = allocation.sizes_within(model.config, share, axes, ranks)
            widths = f"{width} {keep}"
            if widths not in known:
                known[widths] = measure(candidate(width, keep))
                fewer = allocation.gone(model.config, width, keep)
                print(f"width pruning: {fewer:.1%} fewer parameters save {known[widths]:.1%} of {name}", flush=True)
            return known[widths]

        largest = allocation.most(model.config, axes)
        share, found = allocation.search(removed, target, largest, name, **NEAR[name])
        fewer = allocation.gone(model.config, *allocation.sizes_within(model.config, share, axes, ranks))
        require(fewer > 0, f"{name} is {target}, but whole {' and '.join(axes)} make it 0: ask for more")
        return share, {"parameters": fewer, name: found}

    def pruned(self, model: LanguageModel, context: Context, keep: Counts, scores: Scores | None) -> LanguageModel:
        """The model with so many slices in each layer."""

        def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
            (block,), flat, chosen = layer.config.blocks, dict(trees.flatten(layer.params)), {}
            fitted: dict[str, Any] = {}
            for axis, count in keep[layer.index].items():
                path, name = importance.READERS[axis]
                w, gram = ops.in_float32(flat[path]), read[path]["gram"]
                if scores is None:
                    each = importance.of_layer(layer, {path: jnp.diag(gram)}, axis, self.importance)
                else:
                    each = scores[layer.index, axis]
                chosen[axis] = importance.largest(each, count)
                inputs = slicing.features(block, chosen)[name]
                gone = np.setdiff1d(np.arange(len(w)), inputs)
                if self.refit and gone.size:
                    fitted[path] = refit(w, gram, inputs, gone, self.damping)
            along = slicing.features(block, chosen)
            cut = lambda path, leaf: slicing.sliced(f"block_0/{path}", leaf, along)
            params, masks = trees.map_with_path(cut, layer.params), {p: cut(p, mask) for p, mask in layer.masks.items()}
            made = lambda path, leaf: qarray.rounded_anew(fitted[path], leaf) if path in fitted else leaf
            params = ops.apply_masks(trees.map_with_path(made, params), masks)
            config = dataclasses.replace(layer.config, blocks=(slicing.sliced_block(block, chosen),))
            return layer.replace(params=params, masks=masks, config=config), None

        given = {"mesh": context.mesh, "title": "width pruning"}
        return calibrate.walk(model, context.calibration, one, {"gram": calibrate.GRAM}, **given)[0]
