"""Chains of compression steps, and the named ones."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from efflm import trees
from efflm.compress import training
from efflm.compress.adapt import Adapt, Merge
from efflm.compress.awq import AWQ
from efflm.compress.correct import Correct
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.generated import Generated
from efflm.compress.gptq import GPTQ
from efflm.compress.gradual import Gradual
from efflm.compress.magnitude import Magnitude
from efflm.compress.mixed import Mixed
from efflm.compress.qat import QAT
from efflm.compress.quantize import Cast, Quantize
from efflm.compress.rotate import Rotate
from efflm.compress.smoothquant import SmoothQuant
from efflm.compress.sparsegpt import SparseGPT
from efflm.compress.step import Context, Record, Step, digest, trains
from efflm.compress.structured.depth import Depth
from efflm.compress.structured.width import Width
from efflm.compress.tuned import Tuned
from efflm.compress.wanda import Wanda
from efflm.config import require
from efflm.model import LanguageModel
from efflm.ops import LowRank, QArray

# One more method is one more line here.
STEPS: dict[str, type] = {
    kind.__name__.lower(): kind
    for kind in (
        Cast, Quantize, SmoothQuant, AWQ, Rotate, GPTQ, Mixed, Tuned, QAT,
        Magnitude, Gradual, Wanda, SparseGPT, Width, Depth,
        Finetune, Distill, Generated, Correct, Adapt, Merge,
    )
}  # fmt: skip

# Chains in the grammar of compress.grammar, by the names that they have in reports.
RECIPES: dict[str, str] = {
    "bfloat16": "cast@bfloat16",
    "w8a16": "quantize",
    "w8a8": "quantize[activations=int8]",
    "w8a8_static": "quantize[activations=int8_static]",
    "smoothquant_w8a8": "smoothquant,w8a8",
    "smoothquant_w8a8_static": "smoothquant,w8a8_static",
    "w5a16": "quantize@5[group=64,super_block=256,embeddings=5]",
    "w4a16": "quantize@4",
    "w3a16": "quantize@3",
    "w4a16_superblock": "quantize@4[group=16,symmetric=false,super_block=256,embeddings=4]",
    "gptq4": "gptq@4",
    "gptq3": "gptq@3",
    "gptq3_adapted": "gptq3,adapt",
    "rotate_smoothquant": "rotate,smoothquant,w8a8_static",
    "rotate_gptq4": "rotate,gptq4",
    "awq4": "awq@4",
    "mixed4": "mixed@4",
    "tuned4": "tuned@4",
    "tuned4_best": "tuned@4[steps=1000,batch=8]",
    "tuned3": "tuned@3",
    "tuned2": "tuned@2[steps=192]",
    "qat4": "qat@4",
    "magnitude50": "magnitude@0.5",
    "magnitude50_global": "magnitude@0.5[scope=global]",
    "magnitude70": "magnitude@0.7",
    "magnitude24": "magnitude@2:4",
    "magnitude50_trained": "magnitude@0.5,finetune[steps=60,learning_rate=2e-4]",
    "gradual50": "gradual@0.5[learning_rate=2e-4]",
    "wanda50": "wanda@0.5",
    "wanda24": "wanda@2:4",
    "wanda50_w8a8": "wanda@0.5,w8a8",
    "sparsegpt50": "sparsegpt@0.5",
    "sparsegpt70": "sparsegpt@0.7",
    "sparsegpt24": "sparsegpt@2:4",
    "shrink30": "width@0.3",
    "shrink30_distill": "width@0.3,distill[learning_rate=5e-4]",
    "shrink30_distill_int8": "shrink30_distill,w8a16",
    "depth50_distill": "depth,distill[learning_rate=5e-4]",
    "depth50_on_policy": "depth50_distill,generated[steps=50]",
    "student_scratch": "depth[init=random],finetune",
    "student_distilled": "depth[init=random],distill",
    "shrink_distill_int8": "depth,distill,w8a16",
}


def known(steps: Sequence[Step]) -> bool:
    """Whether all steps are of this library."""
    return {*map(type, steps)} <= {*STEPS.values()}


def override(steps: Sequence[Step], changes: Mapping[type, Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps with the fields that `changes` names for a type of step. Raises InputError where several have it."""
    for kind, fields in changes.items():
        count = sum(type(step) is kind for step in steps)
        require(
            not fields or count < 2,
            f"settings for {kind.__name__} would change {count} steps of this recipe: compress by one recipe after the "
            "other, each with its own settings",
        )
    return tuple(dataclasses.replace(step, **changes[type(step)]) if type(step) in changes else step for step in steps)


def require_finite(model: LanguageModel) -> None:
    """Raise InputError for weights that are infinite or NaN: a scale or a mask made of them spoils the others too."""
    problem = trees.not_finite(model.params)
    require(not problem, f"{problem}: such a model cannot be compressed, so fetch or train it again")


def require_masks(model: LanguageModel) -> None:
    """Raise InputError for a mask of a weight that the model does not have, or of another shape."""
    weights = dict(trees.flatten(model.params))
    for path, mask in (model.masks or {}).items():
        require(path in weights, f"masks names {path}, which the model does not have: leave it out")
        shapes = tuple(mask.shape), tuple(weights[path].shape)
        require(
            shapes[0] == shapes[1],
            f"the mask of {path} has shape {shapes[0]}, the weight {shapes[1]}: make it anew for this model",
        )


def require_no_adapters(model: LanguageModel, step: Step) -> None:
    """Raise InputError where a step other than Adapt is to change weights that have adapters beside them."""
    has = [path for path, leaf in trees.flatten(model.params) if isinstance(leaf, LowRank)]
    require(
        not has or isinstance(step, Adapt | Merge),
        f"{', '.join(has[:1])} has an adapter beside it, which {type(step).__name__} cannot change: merge it first "
        "(compress.adapt.Merge), or set merge of Adapt (adapt.merge)",
    )


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where a chain keeps the model after each step but the last.

    save(model, records, key) keeps it in place of the one before; load() returns what was kept last, or None. The key
    is that of the steps so far, of all that they read and of the model that the chain began with.
    """

    save: Callable[[LanguageModel, tuple[Record, ...], str], None]
    load: Callable[[], tuple[LanguageModel, tuple[Record, ...], str] | None]


def apply(
    model: LanguageModel, steps: Sequence[Step], context: Context, kept: Kept | None = None
) -> tuple[LanguageModel, tuple[Record, ...]]:
    """Apply the steps in order; the teacher is the first model unless the context names one. Raises InputError.

    kept: a chain that was interrupted goes on with the step it was in, if model, steps and context are as they were.
    """
    require_finite(model)
    require_masks(model)
    if context.teacher is None:
        context = dataclasses.replace(context, teacher=model)
    records: tuple[Record, ...] = ()
    begin = _begin(model, steps, context) if kept else ""
    key = lambda count: hashlib.sha256(f"{begin} {steps[:count]!r}".encode()).hexdigest()
    found = kept.load() if kept else None
    if found and len(found[1]) < len(steps) and found[2] == key(len(found[1])):
        model, records, _ = found
    folder = context.metrics
    for index, step in enumerate(steps[len(records) :], len(records) + 1):
        file = folder and folder / f"{index}_{type(step).__name__.lower()}.jsonl"
        require_no_adapters(model, step)
        step = training.measured(step, model, context)
        after, done = step(model, dataclasses.replace(context, metrics=file))
        _warn_of_rounding_again(model, after, done)
        model, records = after, (*records, done)
        if kept and index < len(steps):
            kept.save(model, records, key(index))
    return model, records


def _warn_of_rounding_again(before: LanguageModel, after: LanguageModel, done: Record) -> None:
    """On stderr, where a step changed matrices that were quantized before it."""
    old, new = dict(trees.flatten(before.params)), dict(trees.flatten(after.params))
    pairs = [(old[path], new[path]) for path in done.leaves if path in old]
    again = [all(isinstance(leaf, QArray) for leaf in pair) and pair[0].shape == pair[1].shape for pair in pairs]
    if any(again) and len(before.config.blocks) == len(after.config.blocks):  # else other layers have these paths
        print(
            f"warning: {done.step} changed {sum(again)} matrices that were quantized already: it worked on their "
            "dequantized values, and the result was rounded again",
            file=sys.stderr,
        )


def _begin(model: LanguageModel, steps: Sequence[Step], context: Context) -> str:
    """A digest of all that a chain of these steps begins with: the models, the seed and the text."""
    out = hashlib.sha256(f"{digest(model)} {context.seed} {context.corpus} {context.tokenizer}".encode())
    if context.teacher is not model:
        out.update(digest(context.teacher).encode())
    for batch in (context.calibration, context.batches(0) if context.batches and trains(steps) else None):
        for name, array in sorted((batch or {}).items()):
            out.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return out.hexdigest()
