"""Teacher-student distillation (Hinton 2015, arXiv 1503.02531)."""

import dataclasses
import typing

from efflm import ops
from efflm.compress.step import Context, require_schedule, teacher_of, train_step
from efflm.config import flag, require
from efflm.model import LanguageModel, Transformer
from efflm.precision import policy_for
from efflm.train import losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Train the model to imitate the teacher; pruned weights stay zero."""

    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(2e-3, "peak learning rate, reached after a tenth of the steps or 40")
    temperature: float = flag(1.0, "softens both distributions")
    weight: float = flag(0.7, "share of the teacher's part in the loss, in (0, 1]")
    divergence: ops.Divergence = flag(
        "forward",
        "of teacher and student: forward: KL(teacher || student); reverse: KL(student || teacher); jensen_shannon: of "
        "both from their mixture; skew: KL(teacher || mixture)",
    )
    mix: float = flag(0.5, "share of the teacher in the mixture of jensen_shannon and skew, in (0, 1)")

    def __post_init__(self):
        require_schedule(self)
        require(self.temperature > 0, f"temperature is {self.temperature}, but must be positive")
        require(0 < self.weight <= 1, f"weight is {self.weight}, but must be in (0, 1]")
        known = typing.get_args(ops.Divergence)
        require(self.divergence in known, f"divergence is {self.divergence!r}: choose from {', '.join(known)}")
        require(0 < self.mix < 1, f"mix is {self.mix}, but must be in (0, 1)")

    def __call__(self, model: LanguageModel, context: Context):
        teacher = teacher_of(context, model)
        models = (Transformer(each.config, policy_for(each.config)) for each in (model, teacher))
        same = {name: getattr(self, name) for name in ("temperature", "weight", "divergence", "mix")}
        loss = losses.distillation_loss(*models, **same)
        return train_step(self, model, context, loss, frozen=teacher.params)
