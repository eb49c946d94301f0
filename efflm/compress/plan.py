"""What each matrix gets: which number format, or which share of zeros. Rounders and pruners follow a plan; what
measures sensitivity makes one."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees
from efflm.config import flag, require, require_choices
from efflm.model.params import find, in_layer, is_matrix
from efflm.ops import Format, QArray
from efflm.ops.format import Bits, SuperBlock
from efflm.ops.grid import Grid, grid_of

LAYERS, EMBEDDINGS = "layers", "embeddings"  # matrices inside the layers; embeddings and the output layer
TABLES = ("embedding", "unembedding")  # of tokens
FINER = 0.2
Embeddings = Literal[Bits, 0]
Rule = tuple[str, Any]
SUPER_BLOCK = "256: scales of groups are codes of 8 bits, under one of float16 for so many inputs; 0: float16 each"
OF_EMBEDDINGS = (
    "bits of embeddings and the output layer: 8, a scale each; fewer, in the layers' format, and where that has an "
    "entropy bits of it; 0: left alone"
)
ENTROPY = "not 0: bits of entropy of a code, for entropy-coded files; with group 0"


@dataclasses.dataclass(frozen=True)
class Plan:
    """rules: (role or pattern, what matrices get: a Format, or of a pruner the share that goes), in their order.

    A role is LAYERS or EMBEDDINGS, a pattern a regular expression that matches a whole path. The first that fits a
    matrix is its rule; None, or no rule, leaves it as it is.
    """

    rules: tuple[Rule, ...] = ()

    def of(self, path: str) -> Any:
        """What a weight gets; None: it is left as it is."""
        if not is_matrix(path):
            return None
        role = LAYERS if in_layer(path) else EMBEDDINGS
        return next((each for rule, each in self.rules if rule == role or re.fullmatch(rule, path)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounder:
    """The settings that steps which round matrices have in common; `plan_of` makes a plan of them."""

    bits: Bits = flag(4, "bits of a weight")
    group: int = flag(32, "inputs that share a scale; 0: all of an output")
    super_block: SuperBlock = flag(0, SUPER_BLOCK)
    embeddings: Embeddings = flag(8, OF_EMBEDDINGS)
    plan: Plan | None = flag(
        None, "a compress.plan.Plan, in place of all that says how matrices are rounded", internal=True
    )

    at = "bits"

    def __post_init__(self):
        require_choices(self)
        plan_of(self)


def for_embeddings(bits: int, layers: Format) -> tuple[Rule, ...]:
    """The rule for what is outside the layers, which a low precision hurts most."""
    own = {"bits": 8, "entropy": float(bits)} if layers.entropy and bits < 8 else {"bits": bits or 8}
    format = dataclasses.replace(Format() if bits == 8 else layers, activations=layers.activations, **own)
    return ((EMBEDDINGS, format),) if bits else ()


def plan_of(step: Any, **fixed: Any) -> Plan:
    """The plan that a rounder was given, or the one that its fields make: those with the names of a Format's are the
    layers' format, `embeddings` is for the rest. fixed: in place of fields. Raises InputError."""
    if step.plan is not None:
        require_plan(step.plan, Format, "formats")
        return step.plan
    names = [field.name for field in dataclasses.fields(Format)]
    layers = Format(**({name: getattr(step, name) for name in names if hasattr(step, name)} | fixed))
    return Plan(((LAYERS, layers), *for_embeddings(step.embeddings, layers)))


def require_plan(plan: Any, kind: type, what: str) -> None:
    """Raise InputError for what is no plan of values of this kind."""
    good = isinstance(plan, Plan) and all(each is None or isinstance(each, kind) for _, each in plan.rules)
    require(good, f"plan is {plan!s:.60}, but must be a compress.plan.Plan of {what}")


def require_formats(step: Any, plan: Plan, **choices: tuple[Any, ...]) -> None:
    """Raise InputError for a format of a plan that has another value of a field than a rounder knows."""
    for rule, format in plan.rules:
        for name, known in choices.items():
            require(
                format is None or getattr(format, name) in known,
                f"{name} is {getattr(format, name, '')} for {rule}, but {type(step).__name__} knows "
                f"{' and '.join(map(str, known))} only: choose another rounder",
            )


def counted(rows: Mapping[str, Any] | None, vocabulary: int) -> np.ndarray | None:
    """How often the rows of a batch (data.packing) have each token: float32 [V]."""
    if rows is None:
        return None
    read = np.asarray(rows["inputs"])[np.asarray(rows["segments"]) > 0]
    return np.bincount(read, minlength=vocabulary).astype(np.float32)


def unseen(counts: np.ndarray) -> float:
    """How often a token that was not seen is to be expected in a text of this length: all of them together as often as
    there are tokens that were seen once (Good 1953), where most were not seen."""
    return float(max(np.sum(counts == 1), 1) / counts.size)


def grid_for(
    path: str, w: jax.Array, format: Format, counts: np.ndarray | None = None, importance: jax.Array | None = None
) -> Grid:
    """ops.grid.grid_of of a matrix of a model.

    counts: of tokens (`counted`). Of a table whose format has an entropy they make the scales of frequent tokens finer,
    by a power of how often they are to be expected; as few rows are meant, the table hardly grows. The power 1/2, by
    which errors of all tokens would cost the same, is too much: frequent tokens bear more error. On SmolLM2-135M the
    output layer in 2.5 bits has a KL of 0.26, with the powers 0.15, 0.25 and 0.5 of 0.160, 0.165 and 0.234; the table
    of embeddings behaves alike.
    """
    axis = find(path)[0].contracted
    scale, zeros = grid_of(w, axis, format, importance)
    if format.entropy and counts is not None and path in TABLES:
        finer = scale * ((unseen(counts) / (counts + unseen(counts))) ** FINER).reshape(scale.shape)
        scale = jnp.maximum(finer, jnp.max(jnp.abs(w), axis, keepdims=True) / format.high)
    return scale, zeros


def nearest(params: Any, plan: Plan, inside: bool = True, counts: np.ndarray | None = None) -> Any:
    """The tree with the matrices of a plan rounded to the nearest; of QArrays only the activations change.

    inside: whether those of the layers are meant too. counts: see `grid_for`. Scales of activations are dynamic until
    they are calibrated.
    """

    def one(path: str, w: Any) -> Any:
        format = plan.of(path) if inside or not in_layer(path) else None
        if format is None:
            return w
        dynamic = "float" if format.activations == "float" else "int8"
        if isinstance(w, QArray):
            return w.replace(activations=dynamic, activation_scale=None)
        grid = grid_for(path, w, format, counts)
        return ops.quantize_array(w, find(path)[0].contracted, dataclasses.replace(format, activations=dynamic), grid)

    return trees.map_with_path(one, params)
