"""A training run: its steps, optimizer, precision and memory."""

import dataclasses
from typing import Literal

from efflm.config import flag, require, require_choices, require_positive

Optimizer = Literal["adamw", "adamw8bit", "adam", "sgd", "lion", "adafactor", "muon", "schedule_free"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
PolicyName = Literal["float32", "bfloat16", "bfloat16_pure", "float16", "auto"]
OnNan = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Recompute:
    """A policy of rematerialization: what a layer's forward pass stores for its backward pass, and which share of its
    matmuls is therefore done again.

    stored: names of arrays (jax.ad_checkpoint.checkpoint_name) beside the layer's input; None: everything.
    """

    stored: tuple[str, ...] | None
    projections: float = 0.0
    attention: float = 0.0
    feedforward: float = 0.0


REMAT = {
    "none": Recompute(None),
    "dots": Recompute(("matmul",), attention=1.0),  # results of matmuls with weights; norms and activations again too
    "full": Recompute((), projections=1.0, attention=1.0, feedforward=1.0),
}
Remat = Literal[*REMAT]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What every training is told: a run of its own (TrainConfig), and one inside a step of compression."""

    steps: int = flag(150, "optimizer steps")
    optimizer: Optimizer = flag("adamw", "update rule; adamw8bit keeps both moments in 8 bits")
    learning_rate: float = flag(2e-3, "peak learning rate")
    schedule: Schedule = flag(
        "cosine", "course of the learning rate after the warm-up; wsd holds it and decays at the end"
    )
    warmup: int = flag(-1, "steps of linear warm-up; -1: a tenth of all steps, at most 40")
    decay: int = flag(-1, "steps of the decay that ends the wsd schedule; -1: a fifth of all steps")
    final_fraction: float = flag(0.1, "learning rate at the end, as a fraction of the peak")
    weight_decay: float = flag(0.0, "decoupled decay of matrices; norms, biases and embeddings are spared")
    beta1: float = flag(0.9, "decay of the first moment, or the momentum")
    beta2: float = flag(0.99, "decay of the second moment")
    clip: float = flag(1.0, "largest global norm of the gradient")
    z_loss: float = flag(0.0, "weight of the squared log-normalizer in the loss on text, which keeps logits small")
    policy: Literal["", PolicyName] = flag(
        "", "dtype of the matmuls, of a teacher's too (see train.policy); empty: that which each model is run in"
    )
    accumulate: int = flag(
        1, "parts a batch is read in, one after another, for less memory; the devices share each part"
    )
    remat: Remat = flag("none", "what the backward pass computes again: nothing, all but the matmuls, or whole layers")
    scan: bool = flag(False, "one compiled layer looped over (short compile times) in place of unrolled layers")
    on_nan: OnNan = flag("stop", "at a loss or gradient that is not finite: stop, or skip that update and count it")
    log_every: int = flag(10, "steps between lines in the file of metrics")

    trains = True  # of a step of compression: it needs text to train on

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "steps", "learning_rate", "clip", "accumulate", "log_every")
        require(
            -1 <= self.warmup < self.steps,
            f"warmup is {self.warmup}, but must be less than steps, which is {self.steps}: shorten the warm-up",
        )
        require(
            self.schedule != "wsd" or (self.decay >= -1 and self.warmup_steps + self.decay_steps <= self.steps),
            f"schedule is wsd, which is longer than the training: warmup {self.warmup_steps} + decay "
            f"{self.decay_steps} exceed {self.steps} steps: shorten one of them",
        )

    @property
    def warmup_steps(self) -> int:
        return min(40, self.steps // 10) if self.warmup == -1 else self.warmup

    @property
    def decay_steps(self) -> int:
        return self.steps // 5 if self.decay == -1 else self.decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings):
    """One training run"""

    steps: int = flag(500, "optimizer steps")
    batch: int = flag(8, "sequences in a batch, over all devices")
    length: int = flag(256, "tokens in a sequence")
    weight_decay: float = flag(0.1, "decoupled decay of matrices; norms, biases and embeddings are spared")
    policy: PolicyName = flag(
        "float32",
        "dtype of the matmuls, over float32 weights and moments; bfloat16_pure keeps the weights in bfloat16 too, "
        "rounded stochastically; float16 scales the loss dynamically; auto measures for a second whether float32 or "
        "bfloat16 is faster on this machine",
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "batch", "length")
        require(
            self.batch % self.accumulate == 0,
            f"batch is {self.batch}, but must be divisible by accumulate, which is {self.accumulate}: change one of "
            "them",
        )

    def require_within(self, longest: int) -> None:
        """Raise InputError for sequences that are longer than the model reads."""
        found = f"train.length {self.length} is longer than model.max_length {longest}"
        require(self.length <= longest, f"{found}: raise model.max_length")
