"""Plain training on text inside a recipe: sparse training after pruning, or a student without a teacher."""

import dataclasses

from efflm.compress import training
from efflm.compress.step import Context
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(TrainSettings):
    """Train the model on the text in the format it is in; pruned weights stay zero."""

    at = "steps"

    def __call__(self, model: LanguageModel, context: Context):
        return training.train(self, model, context, training.full(model), training.objective(self, model))
