"""Gradual pruning (Zhu 2017, arXiv 1710.01878): the smallest weights go while the model trains, and it adapts."""

import dataclasses

import jax.numpy as jnp

from efflm import trees
from efflm.compress import select
from efflm.compress.step import Context, in_format, record, require_schedule, train_masters
from efflm.config import flag, require, require_sparsity
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.precision import policy_for
from efflm.train import losses, sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradual:
    """Train on text while the smallest weights of each matrix inside the layers are set to zero, more and more."""

    sparsity: float = flag(0.5, "fraction of weights that are zero at the end, in [0, 1)")
    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(2e-3, "peak learning rate, reached after a tenth of the steps or 40")
    every: int = flag(10, "steps from one rise of the sparsity to the next")
    ramp: float = flag(0.5, "share of the steps over which the sparsity rises; the rest only trains")

    at = "sparsity"
    trains = True

    def __post_init__(self):
        require_schedule(self)
        require_sparsity(self.sparsity)
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
        loss = losses.language_model_loss(model.config, policy_for(model.config))
        wrap = lambda rule: sparsity.gradual(rule, self.sparsity, steps=self.rising, every=self.every)
        masters = train_masters(self, model, context, loss, frozen={}, wrap=wrap)
        # Those that training dropped are zeros, and so they are the smallest. What was pruned before stays so.
        masks = dict(model.masks or {})
        for path, w in trees.flatten(masters):
            if in_layer(path):
                dropped = select.smallest(jnp.abs(w).ravel(), round(self.sparsity * w.size)).reshape(w.shape)
                masks[path] = ~dropped & masks[path] if path in masks else ~dropped
        after = model.replace(params=in_format(masters, model.params), masks=masks)
        return after, record(self, model, after, context)
