"""Plain training on text inside a recipe: sparse training after pruning, or a student without a teacher."""

import dataclasses

from efflm.compress.step import Context, require_schedule, train_step
from efflm.config import flag
from efflm.model import LanguageModel
from efflm.precision import policy_for
from efflm.train import losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train the model on the text in the format it is in; pruned weights stay zero."""

    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(2e-3, "peak learning rate, reached after a tenth of the steps or 40")

    at = "steps"
    trains = True

    def __post_init__(self):
        require_schedule(self)

    def __call__(self, model: LanguageModel, context: Context):
        loss = losses.language_model_loss(model.config, policy_for(model.config))
        return train_step(self, model, context, loss, frozen={})
