"""Recovery by adapters: corrections of low rank are trained beside weights that stay as they are.

LoRA (Hu 2021, arXiv 2106.09685); over quantized weights QLoRA (Dettmers 2023, arXiv 2305.14314). Only the adapters
have gradients and an optimizer state.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress.step import Context, fit, record, require_schedule, teacher_of
from efflm.config import flag, require
from efflm.model import LanguageModel, Transformer
from efflm.model.params import in_layer
from efflm.precision import policy_for
from efflm.train import losses


def fresh(model: LanguageModel, rank: int, seed: int) -> Any:
    """{a, b} float32 for every matrix inside the layers, in the tree of the weights: a random with the variance 1 / K
    of its K inputs, b zero, so that nothing is changed yet (Hu 2021, section 4.1)."""
    paths = [(path, leaf.shape) for path, leaf in trees.flatten(model.params) if in_layer(path)]
    keys = jax.random.split(jax.random.key(seed), len(paths))
    made = {}
    for key, (path, (K, N)) in zip(keys, paths, strict=True):
        require(
            rank <= min(K, N), f"rank is {rank}, but {path} has the shape {(K, N)}: give at most the smaller of the two"
        )
        made[f"{path}/a"] = jax.random.normal(key, (K, rank)) / math.sqrt(K)
        made[f"{path}/b"] = jnp.zeros((rank, N))
    return trees.unflatten(made)


def adapted(params: Any, adapters: Any) -> Any:
    """The weights with their adapters beside them."""
    flat = dict(trees.flatten(adapters))
    beside = lambda path, w: ops.LowRank(w, flat[f"{path}/a"], flat[f"{path}/b"]) if f"{path}/a" in flat else w
    return trees.map_with_path(beside, params)


def merged(params: Any, masks: ops.Masks) -> Any:
    """Adapted weights as float matrices, with zeros where masks drop weights."""
    plain = lambda _, w: ops.in_float32(w) if isinstance(w, ops.LowRank) else w
    return ops.apply_masks(trees.map_with_path(plain, params), masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """Train adapters of low rank beside the weights, against the teacher and on text."""

    rank: int = flag(16, "rank of each adapter")
    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(2e-3, "peak learning rate, reached after a tenth of the steps or 40")
    weight: float = flag(0.7, "share of the teacher's part in the loss, in [0, 1]; 0: text alone, and no teacher")
    merge: bool = flag(
        False,
        "add the adapters to the weights, which are rounded to their format again: in every step, straight-through, so "
        "that what is trained is what is merged; pruned weights stay zero. False: they stay beside the weights",
    )

    at = "steps"
    trains = True

    def __post_init__(self):
        require(self.rank > 0, f"rank is {self.rank}, but must be positive")
        require_schedule(self)
        require(0 <= self.weight <= 1, f"weight is {self.weight}, but must be in [0, 1]")

    def __call__(self, model: LanguageModel, context: Context):
        has = [path for path, leaf in trees.flatten(model.params) if isinstance(leaf, ops.LowRank)]
        require(not has, f"{', '.join(has[:1])} has an adapter already: merge it first (compress.adapt.Merge)")
        require(
            self.merge or not model.masks,
            "the model is pruned, and adapters beside its weights would fill their zeros: set adapt.merge",
        )
        policy = policy_for(model.config)
        if self.weight:
            teacher = teacher_of(context, model)
            models = Transformer(model.config, policy), Transformer(teacher.config, policy_for(teacher.config))
            loss, frozen = losses.distillation_loss(*models, temperature=1.0, weight=self.weight), teacher.params
        else:
            loss, frozen = losses.language_model_loss(model.config, policy), {}

        def of_adapters(adapters: Any, given: Any, batch: Any, rng: jax.Array):
            params = adapted(given["model"], adapters)
            if self.merge:
                params = jax.tree.map(
                    lambda master, like: ops.straight_through(master, like) if isinstance(like, ops.LowRank) else like,
                    merged(params, model.masks),
                    params,
                    is_leaf=trees.is_leaf,
                )
            return loss(params, given["teacher"], batch, rng)

        begin = functools.partial(fresh, model, self.rank, context.seed)
        trained = fit(self, context, of_adapters, begin, {"model": model.params, "teacher": frozen}, None)
        params = adapted(model.params, trained)
        if self.merge:
            to = lambda master, w: ops.requantize(master, w) if isinstance(w, ops.LowRank) else w
            params = jax.tree.map(to, merged(params, model.masks), params, is_leaf=trees.is_leaf)
        after = model.replace(params=params)
        return after, record(self, model, after, context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Add the adapters to the weights, which are rounded to their format again."""

    def __call__(self, model: LanguageModel, context: Context):
        one = lambda _, w: ops.requantize(ops.dequantize(w), w) if isinstance(w, ops.LowRank) else w
        after = model.replace(params=ops.apply_masks(trees.map_with_path(one, model.params), model.masks))
        return after, record(self, model, after, context)
