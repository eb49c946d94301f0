"""Chains of compression steps, and the named ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from efflm import trees
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.prune import Prune
from efflm.compress.quantize import Cast, Quantize
from efflm.compress.shrink import Shrink
from efflm.compress.step import Context, Record, Step
from efflm.config import InputError, require
from efflm.model import LanguageModel

W8A16 = Quantize(activations="float")
W8A8 = Quantize(activations="int8")

RECIPES: dict[str, tuple[Step, ...]] = {
    "bfloat16": (Cast(dtype="bfloat16"),),
    "w8a16": (W8A16,),
    "w8a8": (W8A8,),
    "masks50": (Prune(sparsity=0.5),),
    "masks50_global": (Prune(sparsity=0.5, scope="global"),),
    "masks24": (Prune(sparsity=0.5, scope="2:4"),),
    "masks50_trained": (Prune(sparsity=0.5), Finetune(steps=60, learning_rate=2e-4)),
    "student_scratch": (Shrink(init="random"), Finetune()),
    "student_distilled": (Shrink(init="random"), Distill()),
    "shrink_distill_int8": (Shrink(), Distill(), W8A16),
}


def named(names: str) -> tuple[Step, ...]:
    """The steps of one recipe, or of several joined by commas, one after the other, as one chain. Raises InputError."""
    steps: list[Step] = []
    for name in names.split(","):
        if name not in RECIPES:
            raise InputError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}, or several joined by commas")
        steps += RECIPES[name]
    return tuple(steps)


def trains(steps: Sequence[Step]) -> bool:
    """Whether a step of the chain needs text to train on."""
    return any(isinstance(step, Distill | Finetune) for step in steps)


def override(steps: Sequence[Step], changes: dict[type, dict[str, Any]]) -> tuple[Step, ...]:
    """Every step with the fields that `changes` names for its type. Raises InputError for a type not in the chain."""
    for kind, fields in changes.items():
        if fields and not any(type(step) is kind for step in steps):
            raise InputError(
                f"{', '.join(fields)} set for {kind.__name__}, which is not in this recipe: choose another recipe"
            )
    return tuple(dataclasses.replace(step, **changes.get(type(step), {})) for step in steps)


def require_finite(model: LanguageModel) -> None:
    """Raise InputError for weights that are infinite or NaN: a scale or a mask made of them spoils the others too."""
    problem = trees.not_finite(model.params)
    require(not problem, f"{problem}: such a model cannot be compressed, so fetch or train it again")


def run(model: LanguageModel, steps: Sequence[Step], context: Context) -> tuple[LanguageModel, tuple[Record, ...]]:
    """Apply the steps in order; the teacher is the first model unless the context names one. Raises InputError."""
    require_finite(model)
    if context.teacher is None:
        context = dataclasses.replace(context, teacher=model)
    records = []
    folder = context.metrics
    for index, step in enumerate(steps, 1):
        file = folder and folder / f"{index}_{type(step).__name__.lower()}.jsonl"
        model, done = step(model, dataclasses.replace(context, metrics=file))
        records.append(done)
    return model, tuple(records)
