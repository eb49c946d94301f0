"""Teacher-student distillation (Hinton 2015, arXiv 1503.02531), of outputs and optionally of hidden states and of
attention."""

import dataclasses
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import jax

from efflm import ops
from efflm.compress import teacher_cache, training
from efflm.compress.step import Context
from efflm.config import flag, require
from efflm.config.model import ModelConfig
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel
from efflm.model.params import HEAD_MIXTURE, HIDDEN_PROJECTION
from efflm.train import losses


def layer_map(given: str, student: ModelConfig, teacher: ModelConfig) -> losses.Layers:
    """The pairs of layers that "0:1 1:3" names, or every layer of the student with evenly spaced ones of the teacher.

    The last layers are then a pair, as in TinyBERT's uniform map (Jiao 2019, arXiv 1909.10351). Raises InputError for
    a layer that a model does not have.
    """
    layers = {"student": len(student.blocks), "teacher": len(teacher.blocks)}
    if not given.split():
        count = layers["student"]
        return tuple((i, math.ceil((i + 1) * layers["teacher"] / count) - 1) for i in range(count))
    pairs = _pairs(given)
    for pair in pairs:
        for (who, count), layer in zip(layers.items(), pair, strict=True):
            require(
                layer < count,
                f"layers is {given!r}, but the {who} has no layer {layer}: its {count} layers are counted from 0",
            )
    return pairs


def _pairs(given: str) -> losses.Layers:
    return tuple((int(ours), int(theirs)) for ours, theirs in (pair.split(":") for pair in given.split()))


def _normal(layers: losses.Layers, shapes: list[tuple[int, int]], seed: int) -> dict[str, jax.Array]:
    """A matrix of random float32 numbers for each of the student's layers whose shape is not square."""
    keys = jax.random.split(jax.random.key(seed), len(layers))
    named = zip(map(losses.projection_name, (layer for layer, _ in layers)), keys, shapes, strict=True)
    return {name: jax.random.normal(key, shape) for name, key, shape in named if shape[0] != shape[1]}


def projections(layers: losses.Layers, student: int, teacher: int, seed: int) -> dict[str, jax.Array]:
    """A random float32 matrix [student, teacher] for each of the student's layers, which keeps the mean square of what
    it projects; none where the widths are equal."""
    drawn = _normal(layers, [(student, teacher)] * len(layers), seed)
    return {name: w / math.sqrt(student) for name, w in drawn.items()}


def mixtures(layers: losses.Layers, student: ModelConfig, teacher: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """A float32 matrix [heads, teacher's heads] for each of the student's layers that has another number of heads than
    the teacher's: nearly equal shares (see losses.attention_divergence), random so that heads learn to differ."""
    shapes = [(student.blocks[ours].heads, teacher.blocks[theirs].heads) for ours, theirs in layers]
    return {name: 0.1 * w for name, w in _normal(layers, shapes, seed).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(TrainSettings):
    """Train the model to imitate the teacher; pruned weights stay zero."""

    temperature: float = flag(1.0, "softens both distributions")
    weight: float = flag(0.7, "share of the teacher's part in the loss, in (0, 1]")
    divergence: ops.Divergence = flag(
        "forward",
        "of teacher and student: forward: KL(teacher || student); reverse: KL(student || teacher); jensen_shannon: of "
        "both from their mixture; skew: KL(teacher || mixture)",
    )
    mix: float = flag(0.5, "share of the teacher in the mixture of jensen_shannon and skew, in (0, 1)")
    hidden: float = flag(0.0, "weight of the squared error between the outputs of layers, which is added to the loss")
    attention: float = flag(0.0, "weight of KL(teacher's attention || student's) of layers, which is added too")
    layers: str = flag(
        "",
        "which layers these are: pairs student:teacher, counted from 0, as in '0:1 1:3'; empty: all of the student's "
        "and evenly spaced ones of the teacher",
    )
    cache: Literal["", "full", "top_k", "sampled"] = flag(
        "",
        "run the teacher first and keep of every token all probabilities, the largest, or tokens sampled from them; "
        "empty: it runs beside the student",
    )
    entries: int = flag(50, "with cache top_k or sampled: how many of a token")

    at = "steps"

    def __post_init__(self):
        super().__post_init__()
        require(self.temperature > 0, f"temperature is {self.temperature}, but must be positive")
        require(0 < self.weight <= 1, f"weight is {self.weight}, but must be in (0, 1]")
        plain = self.temperature == 1 and self.divergence == "forward" and not self.hidden and not self.attention
        require(
            plain or not self.cache,
            f"cache is {self.cache!r}, which holds what forward KL at temperature 1 needs: leave out divergence, "
            "temperature, hidden and attention, or the cache",
        )
        require(self.entries > 0, f"entries is {self.entries}, but must be positive")
        require(0 < self.mix < 1, f"mix is {self.mix}, but must be in (0, 1)")
        for name in ("hidden", "attention"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}, but must be finite and not negative")
        require(
            bool(re.fullmatch(r"\s*(\d+:\d+(\s+|$))*", self.layers, re.ASCII)),
            f"layers is {self.layers!r}, but must be pairs student:teacher with spaces between them, as in '0:1 1:3'",
        )
        ours = [layer for layer, _ in _pairs(self.layers)]
        require(len(ours) == len(set(ours)), f"layers is {self.layers!r}: give each of the student's layers once")
        require(
            self.hidden > 0 or self.attention > 0 or not ours,
            f"layers is {self.layers!r}, but hidden and attention are 0: give one of them too",
        )

    def __call__(self, model: LanguageModel, context: Context):
        teacher = training.teacher_of(self, context, model)
        if self.cache:
            return self._from_cache(model, teacher, context)
        configs = model.config, teacher.config
        layers = layer_map(self.layers, *configs) if self.hidden or self.attention else ()
        beside = {}
        if self.attention:
            beside[HEAD_MIXTURE] = mixtures(layers, *configs, context.seed)
        if self.hidden:
            beside[HIDDEN_PROJECTION] = projections(layers, *(config.width for config in configs), context.seed)
        told = ("temperature", "weight", "divergence", "mix", "hidden", "attention")
        how = {name: getattr(self, name) for name in told} | {"layers": layers}
        objective = training.objective(self, model, teacher, **how)
        return training.train(self, model, context, training.full(model, beside), objective)

    def _from_cache(self, model: LanguageModel, teacher: LanguageModel, context: Context):
        training.text_of(self, context)
        objective = training.objective(self, model, cached=True, weight=self.weight)
        with TemporaryDirectory() as folder:
            where = context.cache or Path(folder) / "teacher"
            batches, size = teacher_cache.batches_with(where, teacher, context, self.steps, self.cache, self.entries)
            print(f"  the teacher's cache: {size:,} bytes a token", flush=True)
            own = dataclasses.replace(context, watched=())  # other text has no part in the cache
            return training.train(self, model, own, training.full(model), objective, batches)
