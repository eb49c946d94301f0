"""Teacher-student distillation (Hinton 2015, arXiv 1503.02531).

loss = weight * T^2 * KL(teacher || student, both at temperature T) + (1 - weight) * cross-entropy.
"""

import dataclasses
from typing import Any

import jax

from efflm.compress.step import Context, require_schedule, train_step
from efflm.config import flag, require
from efflm.model import LanguageModel
from efflm.precision import policy_for
from efflm.train import losses


def distillation_loss(
    student_BTV: jax.Array,
    teacher_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    temperature: float,
    weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss in nats and its two parts, from logits; no gradient flows into the teacher."""
    teacher_BTV = jax.lax.stop_gradient(teacher_BTV)
    soft_BT = losses.kl_divergence(teacher_BTV / temperature, student_BTV / temperature) * temperature**2
    kl = losses.weighted_mean(soft_BT, weights_BT)
    cross_entropy = losses.weighted_mean(losses.next_token_nll(student_BTV, targets_BT), weights_BT)
    return weight * kl + (1 - weight) * cross_entropy, {"kl": kl, "cross_entropy": cross_entropy}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Train the model to imitate the teacher; pruned weights stay zero."""

    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(2e-3, "peak learning rate, reached after a tenth of the steps or 40")
    temperature: float = flag(1.0, "softens both distributions")
    weight: float = flag(0.7, "share of the teacher's part in the loss, in (0, 1]")

    def __post_init__(self):
        require_schedule(self)
        require(self.temperature > 0, f"temperature is {self.temperature}, but must be positive")
        require(0 < self.weight <= 1, f"weight is {self.weight}, but must be in (0, 1]")

    def __call__(self, model: LanguageModel, context: Context):
        teacher = context.teacher
        require(teacher is not None, "distillation needs a teacher: set context.teacher")
        require(
            teacher.config.vocabulary == model.config.vocabulary,
            f"the teacher's vocabulary is {teacher.config.vocabulary}, the student's {model.config.vocabulary}: "
            "distillation compares them entry by entry",
        )
        policy, teacher_policy = policy_for(model.config), policy_for(teacher.config)

        def loss_fn(params: Any, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array):
            return distillation_loss(
                losses.batch_logits(model.config, policy, params, batch),
                losses.batch_logits(teacher.config, teacher_policy, frozen["teacher"], batch),
                batch["targets"],
                losses.target_weights(batch),
                self.temperature,
                self.weight,
            )

        return train_step(self, model, context, loss_fn, frozen={"teacher": teacher.params})
