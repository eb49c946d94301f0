"""The rows of tables, and those of the evidence: one for each model, measured side by side."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efflm import ops, trees
from efflm.evaluate import answers, quality, throughput
from efflm.evaluate.answers import Answers
from efflm.evaluate.quality import Quality
from efflm.evaluate.scoring import ROUNDED
from efflm.evaluate.throughput import Rate
from efflm.model import LanguageModel, params
from efflm.model.params import Component
from efflm.report import numbers

PHASES = ("prefill", "decode")
BITS = (
    "Bits a weight: 8 x all bytes on disk (codes, scales, zero points, embeddings, output layer, masks, corrections "
    "of low rank) over the weights of the model: pruned ones too, but neither corrections of low rank nor the output "
    "layer that a rotation makes where the first model's is its embeddings."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of any table: what it is about, its figures by name, and what is said of it below the table.

    row.bytes is row.figures["bytes"]. A figure that was not measured, or that a row cannot have, is None.
    """

    name: str
    figures: Mapping[str, Any]
    note: str = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "figures":
            raise AttributeError(name)
        if name not in self.figures:
            raise AttributeError(f"the row {self.name!r} has no {name!r}: its figures are {', '.join(self.figures)}")
        return self.figures[name]

    def at(self, name: str | tuple[str, ...]) -> Any:
        """The figure of this name, or what lies in it: at(("tasks", "arc_easy", "accuracy")); None if nothing does."""
        if isinstance(name, str):
            return getattr(self, name)
        found = self.figures
        for each in name:
            found = (found or {}).get(each)
        return found

    def but(self, **figures: Any) -> "Row":
        """The row with other figures."""
        return dataclasses.replace(self, figures={**self.figures, **figures})

    def json(self) -> dict[str, Any]:
        return {"name": self.name, **self.figures, "note": self.note}


def names(sources: Sequence[str]) -> list[str]:
    """What models are called, each differently: the last part of where it is from, without the suffix of its file (dots
    in a name are part of it), with as much of what stands before as tells it apart; the same source again has a number.
    """
    whole = [Path(source).expanduser() for source in sources]
    whole = [Path(os.path.abspath(path)) if path.exists() else path for path in whole]
    short = [path.name.removesuffix(".safetensors").removesuffix(".gguf") for path in whole]
    most = max(len(path.parts) for path in whole)
    longer = [["/".join(path.parts[-count:]) for path in whole] for count in range(1, 1 + most)]
    told = next(each for each in (short, *longer) if len(set(each)) == len(set(whole)))
    again = [whole[:index].count(path) for index, path in enumerate(whole)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(told, again, strict=True)]


# Steps after which the weights that stay have the values that they had, or are rounded: others move them off the grid
# that they were dequantized from.
ON_GRID = {"Cast", "Depth", "Magnitude", "Quantize", "Wanda", "Width"}


def grid(about: dict[str, Any]) -> str:
    """The format on whose grid the weights lie, or "". about: see formats.sources.Loaded."""
    moved = {step.get("step") for step in about.get("lineage", ())} - ON_GRID
    return "" if moved else about.get("dequantized", "")


def label(about: dict[str, Any]) -> str:
    """What the first of several models is called."""
    return f"dequantized {grid(about)}" if grid(about) else "before"


def origin(source: str, about: dict[str, Any]) -> str:
    """Where a model is from, in words: what it was before it became floats must be said."""
    return f"from {source}" + (f", dequantized {about['dequantized']}" if "dequantized" in about else "")


def cautions(model: str, about: dict[str, Any], seen: str) -> list[str]:
    """What the figures do not show. seen: the text that the model was in all likelihood trained on elsewhere,
    if that is what is scored."""
    out = []
    if seen:
        out.append(
            f"{model} was in all likelihood trained on {seen}: compare these rows with each other and not with other "
            "texts, or score a text of your own."
        )
    if grid(about):
        out.append(
            f"The weights of {model} are dequantized {grid(about)}: they lie on that format's grid, so "
            "nothing here says what rounding to as few bits would cost a model whose weights do not."
        )
    return out


def note(done: str, model: LanguageModel) -> str:
    """What was done, and of a pruned model that its zeros do not make it faster."""
    if not model.masks:
        return done
    size = numbers.megabytes(trees.nbytes(model.params))
    zeros = f"no faster, since a masked dense matrix multiplies its zeros too; {size} MB if dense"
    return "; ".join(filter(None, [done, zeros]))


def collect(
    models: dict[str, LanguageModel],
    sizes: dict[str, int],
    notes: dict[str, str],
    qualities: dict[str, Quality],
    rates: dict[str, tuple[Rate, Rate]] | None,
    noise: Quality | None = None,
    answered: Mapping[str, Mapping[str, Answers]] | None = None,
) -> list[Row]:
    """A row for each model, in order. sizes: bytes on disk. notes: what was done, to which the measured speeds are
    added in words. rates: None where speed was not measured. noise, answered: see scoring.Figures. Speeds, bits and
    answers are compared with the first model's.
    """
    first, out, speeds = next(iter(models)), [], rates or dict.fromkeys(models)
    tied = models[first].config.tied
    for name, model in models.items():
        base = None if name == first else (qualities[first], speeds[first])
        told = tasks(answered or {}, name, first)
        out.append(make(name, model, sizes[name], notes[name], qualities[name], speeds[name], base, noise, told, tied))
    return out


def tasks(answered: Mapping[str, Mapping[str, Answers]], name: str, first: str) -> dict[str, dict[str, Any]]:
    """{task: what the row `name` says of it}, see answers.figures. answered: {name: {task: its answers}}."""
    rounded = answered.get(ROUNDED, {})
    return {
        task: answers.figures(own, answered[first][task], rounded.get(task))
        for task, own in answered.get(name, {}).items()
    }


def make(
    name: str,
    model: LanguageModel,
    size: int,
    note: str,
    measured: Quality,
    rates: tuple[Rate, Rate] | None,
    base: tuple[Quality, tuple[Rate, Rate] | None] | None,
    noise: Quality | None = None,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    tied: bool = False,
) -> Row:
    """What a model is, what it costs here, and how good it is.

    rates: prefill and decode; None: not measured. base: the first row's measurements, made in turn with these; None for
    that row itself. Of its figures, spreads are the quartiles of the repeats. The difference to the original is
    paired over documents, so its error is far below that of either alone. Of a single document there is no error. Nor
    is there a difference, divergence or agreement of the original itself. Speeds over the original's are ratios
    (see throughput.ratio) to what it did in the same rounds, perhaps at another time than those of other rows.
    component_bytes: as the function gives them. noise: KL and agreement of the first model with itself in another
    precision, which its row has. tasks: what the function of that name gives. tied: as in `bits_a_weight`.
    """
    other, base_rates = base or (None, None)
    none, words, speeds = (None, None), [note], {}
    ratios = {f"{phase}_speedup": none for phase in PHASES}
    if rates and base_rates:
        ratios = {name: throughput.ratio(*pair) for name, *pair in zip(ratios, rates, base_rates, strict=True)}
        shown = zip(PHASES, ratios.values(), strict=True)
        words += [f"{phase} {' '.join(numbers.times(*ratio))} the first row's" for phase, ratio in shown]
    for phase, rate in zip(PHASES, rates or none, strict=True):
        speeds[f"{phase}_tokens_per_second"] = rate and round(rate.median, 1)
        speeds[f"{phase}_spread"] = rate and (round(rate.low, 1), round(rate.high, 1))
    figures = {
        "precision": model.config.precision,
        "parameters": trees.count(model.params),
        "nonzeros": ops.nonzeros(model.params),
        "bytes": size,
        "bits_a_weight": bits_a_weight(model, size, tied),
        "component_bytes": component_bytes(model),
        **speeds,
    }
    figures |= with_errors(ratios) | of_text(measured, other)
    figures |= {"noise": rounding(noise) if noise and base is None else None, "tasks": tasks or {}}
    return Row(name, figures, "; ".join(word for word in words if word))


def of_text(measured: Quality, other: Quality | None) -> dict[str, float | None]:
    """How good a model is on a text, and how far from the first one there, with errors. other: the first model's sums;
    None for that model itself, which has no such difference."""
    none = (None, None)
    return with_errors(
        {
            "bits_per_byte": quality.bits_per_byte(measured),
            "bits_per_byte_increase": quality.paired_difference(measured, other) if other else none,
            "perplexity": quality.perplexity(measured),
            "kl_to_original": quality.divergence(measured) if other else none,
            "top1_agreement": quality.agreement(measured) if other else none,
        }
    )


def with_errors(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Each value, and its error as NAME_stderr."""
    parts = ({name: value, f"{name}_stderr": error} for name, (value, error) in figures.items())
    return {name: value for part in parts for name, value in part.items()}


def rounding(noise: Quality) -> dict[str, float | None]:
    """What float rounding alone does (see quality.rounded), as the first row has it."""
    (kl, kl_error), (same, same_error) = quality.divergence(noise), quality.agreement(noise)
    figures = {"kl_to_original": kl, "kl_to_original_stderr": kl_error}
    return figures | {"top1_agreement": same, "top1_agreement_stderr": same_error}


def bits_a_weight(model: LanguageModel, size: int, tied: bool) -> float:
    """Of `size` bytes, see BITS. tied: whether the output layer of the first model is its embeddings, so that one of
    this model's own is a copy of them that Rotate made."""
    again = model.params["unembedding"].shape if tied and not model.config.tied else (0,)
    return 8 * size / (trees.count(model.params) - math.prod(again))


def component_bytes(model: LanguageModel) -> dict[str, int]:
    """{component: bytes of its weights as a file holds them that is not entropy-coded}, embeddings first. Bitmasks and
    scales are included."""
    table, masks, found = params.table(model.config), model.masks or {}, dict.fromkeys(typing.get_args(Component), 0)
    for path, leaf in trees.flatten(model.params):
        mask = {path: masks[path]} if path in masks else None
        found[table[path].component] += ops.stored_nbytes({path: leaf}, mask, coded=False)
    return {name: nbytes for name, nbytes in found.items() if nbytes}
