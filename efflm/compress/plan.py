"""Which number format each matrix gets. Rounders follow a plan; what measures sensitivity makes one."""

import dataclasses
import re
from typing import Any, Literal, get_args

from efflm import ops, trees
from efflm.config import require
from efflm.model.params import find, in_layer, is_matrix
from efflm.ops import Format, QArray
from efflm.ops.format import Bits

LAYERS, EMBEDDINGS = "layers", "embeddings"  # matrices inside the layers; embeddings and the output layer
Embeddings = Literal[Bits, 0]
Rule = tuple[str, Format | None]
# The help of two fields that every rounder has.
OF_EMBEDDINGS = "bits of embeddings and the output layer: 8, a scale each; fewer, in the layers' format; 0: left alone"
OF_PLAN = "a compress.plan.Plan, in place of all that says how matrices are rounded"


@dataclasses.dataclass(frozen=True)
class Plan:
    """rules: (role or pattern, format), in their order. A role is LAYERS or EMBEDDINGS, a pattern a regular expression
    that matches a whole path. The first that fits a matrix is its rule; None, or no rule, leaves it as it is."""

    rules: tuple[Rule, ...] = ()

    def of(self, path: str) -> Format | None:
        """The format of a weight; None: it is not rounded."""
        if not is_matrix(path):
            return None
        role = LAYERS if in_layer(path) else EMBEDDINGS
        return next((format for rule, format in self.rules if rule == role or re.fullmatch(rule, path)), None)


def for_embeddings(bits: int, layers: Format) -> tuple[Rule, ...]:
    """The rule for what is outside the layers, which a low precision hurts most. Raises InputError."""
    choices = get_args(Embeddings)
    require(bits in choices, f"embeddings is {bits}, but must be one of {', '.join(map(str, choices))}")
    format = dataclasses.replace(Format() if bits == 8 else layers, bits=bits or 8, activations=layers.activations)
    return ((EMBEDDINGS, format),) if bits else ()


def plan_of(step: Any, **fixed: Any) -> Plan:
    """The plan that a rounder was given, or the one that its fields make: those with the names of a Format's are the
    layers' format, `embeddings` is for the rest. fixed: in place of fields. Raises InputError."""
    if step.plan is not None:
        require(isinstance(step.plan, Plan), f"plan is {step.plan!s:.60}, but must be a compress.plan.Plan")
        return step.plan
    names = [field.name for field in dataclasses.fields(Format)]
    layers = Format(**({name: getattr(step, name) for name in names if hasattr(step, name)} | fixed))
    return Plan(((LAYERS, layers), *for_embeddings(step.embeddings, layers)))


def require_formats(step: Any, plan: Plan, **choices: tuple[Any, ...]) -> None:
    """Raise InputError for a format of a plan that has another value of a field than a rounder knows."""
    for rule, format in plan.rules:
        for name, known in choices.items():
            require(
                format is None or getattr(format, name) in known,
                f"{name} is {getattr(format, name, '')} for {rule}, but {type(step).__name__} knows "
                f"{' and '.join(map(str, known))} only: choose another rounder",
            )


def nearest(params: Any, plan: Plan, inside: bool = True) -> Any:
    """The tree with the matrices of a plan rounded to the nearest; of QArrays only the activations change.

    inside: whether those of the layers are meant too. Scales of activations are dynamic until they are calibrated.
    """

    def one(path: str, w: Any) -> Any:
        format = plan.of(path) if inside or not in_layer(path) else None
        if format is None:
            return w
        dynamic = "float" if format.activations == "float" else "int8"
        if isinstance(w, QArray):
            return w.replace(activations=dynamic, activation_scale=None)
        return ops.quantize_array(w, find(path)[0].contracted, dataclasses.replace(format, activations=dynamic))

    return trees.map_with_path(one, params)
