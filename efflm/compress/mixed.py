"""Mixed precision: matrices that a low precision hurts most get more bits, others fewer, under a budget of bytes.

What it costs to round one matrix alone is taken to add up (Cai 2020, arXiv 2001.00281, section
3.2). Under that assumption the choice is exact: all choices that none beats in both bytes and loss are kept.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from efflm import ops, trees
from efflm.compress import sensitivity
from efflm.compress.plan import OF_EMBEDDINGS, Embeddings, Plan, for_embeddings, nearest
from efflm.compress.sensitivity import Row, Unit
from efflm.compress.step import Context, record
from efflm.config import flag, require, require_choices
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops import Format


def allocate(costs: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which option each item takes, so that the sum of costs is the least of all with at most `budget` bytes.

    costs[i][j], nbytes[i][j]: of option j of item i, finite and whole. A dynamic program over the Pareto front of
    (bytes, cost) of the items so far. Bytes are whole numbers, so the front has no more points than there are sums of
    bytes: where the options are multiples of a unit, no more than budget / unit. Raises InputError.
    """
    sizes = [np.asarray(each, np.int64) for each in nbytes]
    values = [np.asarray(each, np.float64) for each in costs]
    require(all(np.all(np.isfinite(each)) for each in values), "a cost is infinite or NaN: there is no best choice")
    least = [0, *np.cumsum([each.min() for each in sizes[::-1]])][::-1]  # bytes of what comes after, at least
    require(
        least[0] <= budget,
        f"the budget is {budget:,} bytes, but the least that the formats can take is {least[0]:,}: raise it",
    )
    total, cost = np.zeros(1, np.int64), np.zeros(1)
    taken: list[tuple[np.ndarray, np.ndarray]] = []  # for each item, of each point: the point before, and the option
    for size, value, rest in zip(sizes, values, least[1:], strict=True):
        sums = (total[:, None] + size[None]).ravel()
        costs_now = (cost[:, None] + value[None]).ravel()
        order = np.lexsort((costs_now, sums))
        order = order[sums[order] + rest <= budget]
        best = np.minimum.accumulate(np.concatenate([[np.inf], costs_now[order][:-1]]))
        kept = order[costs_now[order] < best]
        taken.append(np.divmod(kept, len(size)))
        total, cost = sums[kept], costs_now[kept]
    point, choice = len(cost) - 1, []  # costs fall along the front
    for before, option in reversed(taken):
        choice.append(int(option[point]))
        point = before[point]
    return choice[::-1]


def _numbers(text: str, name: str) -> tuple[int, ...]:
    found = re.fullmatch(r"\d{1,6}(?:,\d{1,6})*", text)
    require(found is not None, f"{name} is {text!r}, but must be numbers joined by commas: as in 8,4,3")
    return tuple(dict.fromkeys(map(int, text.split(","))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Matrices inside the layers, each in the format that a budget of bytes gives it, rounded to the nearest unless
    another rounder is given."""

    bits: str = flag("8,4,3", "bits of a weight to choose from")
    groups: str = flag("32,64,128", "inputs that share a scale, to choose from; 0: all of an output")
    average_bits: float = flag(4.0, "the budget: as if all weights had so many bits, in the first of the groups")
    budget: float = flag(0.0, "bytes of the layers' matrices as a share of what they take now; 0: by average_bits")
    unit: Unit = flag("matrix", "what has one format: a matrix, those that read the same input, or a layer")
    cost: Literal["divergence", "scaled", "loss", "estimate"] = flag(
        "scaled",
        "divergence of the outputs, or increase of the loss, when a matrix alone is rounded; estimate: the squared "
        "error of what it gives; scaled: the divergence in the coarsest format, in others in proportion to that error",
    )
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "choose the range of each scale by the least squared error")
    rows: int = flag(8, "sequences of the calibration text over which the loss is measured")
    embeddings: Embeddings = flag(8, OF_EMBEDDINGS)
    rounder: Any = flag(None, "a step with a plan, such as GPTQ(), that rounds; None: to the nearest", internal=True)

    at = "average_bits"
    calibrates = True

    def __post_init__(self):
        require_choices(self)
        rounds = self.rounder is None or hasattr(self.rounder, "plan")
        require(rounds, f"rounder is {self.rounder!s:.60}, but must be a step with a plan, such as GPTQ()")
        require(self.average_bits > 0, f"average_bits is {self.average_bits}, but must be positive")
        require(0 <= self.budget <= 1, f"budget is {self.budget}, but must be a share, or 0 for average_bits")
        require(self.rows > 0, f"rows is {self.rows}, but must be positive")
        _ = self.formats  # which check themselves

    @property
    def formats(self) -> tuple[Format, ...]:
        every = itertools.product(_numbers(self.groups, "groups"), _numbers(self.bits, "bits"))
        return tuple(Format(bits=bits, group=group, symmetric=self.symmetric, clip=self.clip) for group, bits in every)

    @property
    def coarsest(self) -> Format:
        return min(self.formats, key=lambda format: (format.bits, -(format.group or math.inf)))

    def __call__(self, model: LanguageModel, context: Context):
        plan = self.plan(model, context)
        if self.rounder is not None:
            after, _ = dataclasses.replace(self.rounder, plan=plan)(model, context)
        else:
            inside = lambda path, w: ops.dequantize(w) if in_layer(path) else w
            after = model.replace(params=nearest(trees.map_with_path(inside, model.params), plan))
        return after, record(self, model, after, context)

    def plan(self, model: LanguageModel, context: Context) -> Plan:
        """The formats with the least sum of costs within the budget."""
        units = self.measured(model, context)
        costs = [[getattr(row, "divergence" if self.cost == "scaled" else self.cost) for row in rows] for rows in units]
        chosen = allocate(costs, [[row.bytes for row in rows] for rows in units], self.allowed(model, units))
        rows = [rows[option] for rows, option in zip(units, chosen)]
        rules = [(re.escape(path), row.format) for row in rows for path in row.paths]
        return Plan((*rules, *for_embeddings(self.embeddings, self.formats[0])))

    def measured(self, model: LanguageModel, context: Context) -> list[tuple[Row, ...]]:
        """The rows of each unit, a row a format, with the cost that the step asks for. They are kept with this value of
        the model: another budget for the same text measures nothing again."""
        kept = vars(model).setdefault("_sensitivities", {})
        same = dataclasses.replace(self, average_bits=1.0, budget=0.0, embeddings=8, rounder=None)
        text, found = kept.get(same, (None, None))
        if text is None or text is not context.calibration:
            found = self._measured(model, context)
            kept[same] = context.calibration, found
        return found

    def _measured(self, model: LanguageModel, context: Context) -> list[tuple[Row, ...]]:
        given = {"batch": context.calibration, "mesh": context.mesh, "rows": self.rows, "unit": self.unit}
        if self.cost in ("divergence", "loss"):
            return list(sensitivity.sensitivity(model, formats=self.formats, **given).units.values())
        units = list(sensitivity.estimated(model, formats=self.formats, **given).units.values())
        if self.cost == "estimate":
            return units
        known = sensitivity.sensitivity(model, formats=[self.coarsest], **given).units
        out = []
        for rows in units:
            (one,) = known[rows[0].name]
            ratio = one.divergence / one.estimate if one.estimate > 0 else 0.0
            out.append(tuple(dataclasses.replace(row, divergence=ratio * row.estimate) for row in rows))
        return out

    def allowed(self, model: LanguageModel, units: Sequence[Sequence[Row]]) -> int:
        """The bytes that the matrices may take."""
        weights = dict(trees.flatten(model.params))
        paths = [path for rows in units for path in rows[0].paths]
        if self.budget:
            now = {path: weights[path] for path in paths}
            return int(self.budget * ops.stored_nbytes(now, model.masks))
        total = 0.0
        for path in paths:
            K, N = weights[path].shape
            made = ops.quantize_array(ops.dequantize(weights[path]), -2, self.formats[0])
            total += self.average_bits / 8 * K * N + trees.nbytes(made) - made.values.nbytes
        return int(total)
