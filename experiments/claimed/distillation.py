"""Claims 12 and 13: what a teacher gives a student."""

import numpy as np

from efflm.model import LanguageModel
from experiments.claimed.claim import Claim, Effect
from experiments.claimed.lab import PROTOCOL, Lab, percent

# --- 12, 13 ----------------------------------------------------------------------------------------------------------

BUDGETS = (1 / 16, 1 / 4, 1.0)


def student(lab: Lab, seed: int, step: str) -> LanguageModel:
    """Half the layers, randomly initialized, after a step that trains."""
    dense = lab.dense(seed)
    return lab.compressed(dense, f"depth[init=random],{step}", seed, dense)


def budgets(lab: Lab, seed: int) -> dict[str, float]:
    gains = []
    for share in BUDGETS:
        steps = [lab.training(name, share, learning_rate=lab.train.learning_rate) for name in ("finetune", "distill")]
        gains.append(percent(*(lab.loss(student(lab, seed, step)) for step in steps)))
    return {
        "smallest budget: a teacher gains, %": gains[0],
        "largest budget: it gains less by, points": gains[0] - gains[-1],
        "largest budget: a teacher gains, %": gains[-1],
        "steps at which it gains nothing (if beyond the largest budget, twice that)": crossing(lab, gains),
    }


def crossing(lab: Lab, gains: list[float]) -> float:
    """The steps at which gains fall to 0, straight between budgets in their logarithm; twice the largest if nowhere."""
    steps = [lab.steps(share) for share in BUDGETS]
    for i in range(len(gains) - 1):
        if gains[i] > 0 >= gains[i + 1]:
            return float(np.exp(np.interp(0.0, [-gains[i], -gains[i + 1]], np.log(steps[i : i + 2]))))
    return 2.0 * steps[-1]


def teacher_caches(lab: Lab, seed: int) -> dict[str, float]:
    loss, error = {}, {}
    for cache in ("full", "top_k", "sampled"):
        settings = {"learning_rate": lab.train.learning_rate, "weight": 1.0, "cache": cache, "entries": 8}
        model = student(lab, seed, lab.training("distill", 1 / 4, **settings))
        loss[cache], error[cache] = lab.loss(model), 100 * lab.calibration_error(model)
    return {
        "top 8: calibration error above full by, points": error["top_k"] - error["full"],
        "top 8: loss over full, %": percent(loss["top_k"], loss["full"]),
        "8 sampled: calibration error above full by, points": error["sampled"] - error["full"],
        "8 sampled: loss over full, %": percent(loss["sampled"], loss["full"]),
    }


CLAIMS = (
    Claim(
        number=12,
        statement="Distillation beats training from scratch until the budget is large.",
        source="Busbridge 2025, arXiv 2502.08606",
        question="What does a teacher gain a student of half the layers, at growing budgets, and where is it nothing?",
        protocol=PROTOCOL + "Fresh students, a 16th, a quarter and all of the teacher's steps, same batches.",
        effects=(
            Effect("smallest budget: a teacher gains, %", above=0),
            Effect("largest budget: it gains less by, points", above=0),
            Effect("largest budget: a teacher gains, %", below=0),
            Effect("steps at which it gains nothing (if beyond the largest budget, twice that)"),
        ),
        minutes=9,
        measure=budgets,
    ),
    Claim(
        number=13,
        statement="Caches of a teacher's top-k probabilities bias the student.",
        source="Anshumann 2025, arXiv 2503.16870",
        question="How much worse calibrated, and how much worse, is a student of the 8 largest probabilities?",
        protocol=PROTOCOL + "Fresh students of half the layers, KL alone, a quarter of the steps. Expected calibration "
        "error of next tokens in 15 bins. Beside it 8 tokens drawn from the teacher, which are unbiased.",
        effects=(
            Effect("top 8: calibration error above full by, points", above=0),
            Effect("top 8: loss over full, %", above=0),
            Effect("8 sampled: calibration error above full by, points"),
            Effect("8 sampled: loss over full, %"),
        ),
        minutes=4,
        measure=teacher_caches,
    ),
)
