"""Recovery by adapters: corrections of low rank are trained beside weights that stay as they are.

LoRA (Hu 2021, arXiv 2106.09685); over quantized weights QLoRA (Dettmers 2023, arXiv 2305.14314). Only the adapters
have gradients and an optimizer state.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress import training
from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops import lowrank, qarray
from efflm.precision import cast


def initial(model: LanguageModel, rank: int, seed: int) -> Any:
    """{"a": matrices [K, rank], "b": [rank, N]}, each under the path of a matrix [K, N] inside the layers, float32:
    those that are beside it already; else a random with the variance 1 / K of its K inputs, b zero, so that nothing is
    changed yet (Hu 2021, section 4.1)."""
    inside = [(path, leaf) for path, leaf in trees.flatten(model.params) if in_layer(path)]
    keys = jax.random.split(jax.random.key(seed), len(inside))
    made = {}
    for key, (path, leaf) in zip(keys, inside, strict=True):
        if isinstance(leaf, ops.LowRank):
            made |= {f"{name}/{path}": jnp.array(part, jnp.float32) for name, part in (("a", leaf.a), ("b", leaf.b))}
            continue
        K, N = leaf.shape
        require(
            rank <= min(K, N), f"rank is {rank}, but {path} has the shape {(K, N)}: give at most the smaller of the two"
        )
        made[f"a/{path}"] = jax.random.normal(key, (K, rank)) / math.sqrt(K)
        made[f"b/{path}"] = jnp.zeros((rank, N))
    return trees.unflatten(made)


def low_rank(model: LanguageModel, rank: int, seed: int, merge: bool) -> training.Parametrization:
    """Adapters beside weights that stay. merge: the loss is of the sums, as the weights' formats round them, with zeros
    where masks drop weights."""
    masks, (bases, _) = model.masks or {}, lowrank.split(model.params)

    def finish(fn: Callable[[jax.Array, Any], Any], adapters: Any, params: Any) -> Any:
        a, b = (dict(trees.flatten(adapters[name])) for name in ("a", "b"))

        def one(path: str, w: Any) -> Any:
            if path not in a:
                return w
            beside = ops.LowRank(w, a[path], b[path])
            if not merge:
                return beside
            whole = ops.in_float32(beside)
            return fn(jnp.where(masks[path], whole, 0.0) if path in masks else whole, w)

        return trees.map_with_path(one, params)

    stored = lambda adapters: adapters if merge else cast(adapters, lowrank.STORED)
    return training.Parametrization(
        start=lambda: initial(model, rank, seed),
        seen=lambda adapters, params: finish(ops.straight_through, adapters, params),
        finished=lambda adapters: model.replace(params=finish(ops.requantize, stored(adapters), bases)),
        frozen=bases,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt(TrainSettings):
    """Train adapters of low rank beside the weights, against the teacher and on text."""

    rank: int = flag(16, "rank of each adapter; those that are beside weights already (correct, adapt) keep theirs")
    weight: float = flag(0.7, "share of the teacher's part in the loss, in [0, 1]; 0: text alone, and no teacher")
    merge: bool = flag(
        False,
        "add the adapters to the weights, which are rounded to their format again: in every step, straight-through, so "
        "that what is trained is what is merged; pruned weights stay zero. False: they stay beside the weights",
    )

    at = "steps"

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, f"rank is {self.rank}, but must be positive")
        require(0 <= self.weight <= 1, f"weight is {self.weight}, but must be in [0, 1]")

    def __call__(self, model: LanguageModel, context: Context):
        require(
            self.merge or not model.masks,
            "the model is pruned, and adapters beside its weights would fill their zeros: set adapt.merge",
        )
        teacher = training.teacher_of(self, context, model) if self.weight else None
        objective = training.objective(self, model, teacher, weight=self.weight)
        adapters = low_rank(model, self.rank, context.seed, self.merge)
        return training.train(self, model, context, adapters, objective)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Add the adapters to the weights, which are rounded to their format again.

    The scales are those of the sums: what is trained apart from a grid need not keep within it.
    """

    def __call__(self, model: LanguageModel, context: Context):
        one = lambda _, w: qarray.rounded_anew(ops.dequantize(w), w.base) if isinstance(w, ops.LowRank) else w
        after = model.replace(params=ops.apply_masks(trees.map_with_path(one, model.params), model.masks))
        return after, record(self, model, after, context)
