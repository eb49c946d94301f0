"""Gradual pruning (Zhu 2017, arXiv 1710.01878): the smallest weights go while the model trains, and it adapts."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from efflm import trees
from efflm.compress import select, training
from efflm.compress.step import Context
from efflm.config import flag, require, require_sparsity
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.train import sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradual(TrainSettings):
    """Train on text while the smallest weights of each matrix inside the layers are set to zero, more and more."""

    sparsity: float = flag(0.5, "fraction of weights that are zero at the end, in [0, 1)")
    every: int = flag(10, "steps from one rise of the sparsity to the next")
    ramp: float = flag(0.5, "share of the steps over which the sparsity rises; the rest only trains")

    at = "sparsity"

    def __post_init__(self):
        super().__post_init__()
        require_sparsity(self.sparsity)
        require(
            self.optimizer != "schedule_free",
            "optimizer is schedule_free, whose averages hold what was dropped: choose another one",
        )
        require(self.every > 0, f"every is {self.every}, but must be positive")
        require(0 < self.ramp <= 1, f"ramp is {self.ramp}, but must be a share above 0")
        last = self.every * sparsity.stages(self.rising, self.every)
        require(
            last < self.steps,
            f"the sparsity rises for the last time after {last} steps, but there are only {self.steps}: lower every or "
            "ramp, or train for more steps",
        )

    @property
    def rising(self) -> int:
        """The steps over which the sparsity rises."""
        return max(1, round(self.ramp * self.steps))

    def __call__(self, model: LanguageModel, context: Context):
        weights = training.full(model)

        def finished(trained: Any) -> LanguageModel:
            # Those that training dropped are zeros, and so they are the smallest. What was pruned before stays so.
            inside = ((path, w) for path, w in trees.flatten(trained) if in_layer(path))
            masks = {path: select.kept(jnp.abs(w), self.sparsity) for path, w in inside}
            return weights.finished(trained).replace(masks=select.joint(model.masks, masks))

        wrap = lambda rule: sparsity.gradual(rule, self.sparsity, steps=self.rising, every=self.every)
        gradual = dataclasses.replace(weights, finished=finished, wrap=wrap)
        return training.train(self, model, context, gradual, training.objective(self, model))
