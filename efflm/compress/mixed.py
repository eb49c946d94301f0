"""Mixed precision: matrices that a low precision hurts most get more bits, others fewer, under a budget of bytes.

What it costs to round one matrix alone is predicted by the Fisher information of the model (Tseng 2025, arXiv
2505.22988) and taken to add up (Cai 2020, arXiv 2001.00281, section 3.2). Under that assumption the choice is exact:
all choices that none beats in both bytes and loss are kept.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from efflm import ops, trees
from efflm.compress import sensitivity
from efflm.compress.gptq import GPTQ
from efflm.compress.plan import SUPER_BLOCK, Plan
from efflm.compress.quantize import Quantize
from efflm.compress.sensitivity import Row, Unit
from efflm.compress.step import Context, record
from efflm.compress.tuned import Tuned
from efflm.config import flag, require, require_choices
from efflm.model import LanguageModel
from efflm.ops import Format
from efflm.ops.format import SuperBlock


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


ROUNDERS = {"gptq": GPTQ, "tuned": Tuned, "nearest": Quantize}
# Bits of a code, to choose from where files are coded.
ENTROPIES = (*np.arange(1, 4, 0.25).tolist(), *np.arange(4, 6.6, 0.5).tolist())
SMALL_UNITS = 2**14  # of an entropy-coded file's budget; the sizes of choices are counted in them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Matrices and embeddings, each in the format that a budget of bytes gives it, rounded by another step."""

    bits: str = flag("8,7,6,5,4,3,2", "bits of a weight to choose from")
    groups: str = flag(
        "", "inputs that share a scale, to choose from; 0: all of an output; default: 32 and 128, and of 8 bits also 16"
    )
    super_block: SuperBlock = flag(256, SUPER_BLOCK)
    average_bits: float = flag(4.0, "the budget: bytes of the whole file, scales and norms too, as bits a weight")
    megabytes: float = flag(0.0, "the budget as megabytes of the file; 0: by average_bits")
    unit: Unit = flag("matrix", "what has one format: a matrix, those that read the same input, or a layer")
    cost: Literal["predicted", "divergence", "loss"] = flag(
        "predicted",
        "divergence of the outputs, or increase of the loss, when one matrix is rounded; predicted: that divergence "
        "by the Fisher information, which takes one backward pass",
    )
    coded: bool = flag(
        False,
        "the budget is of an entropy-coded file, as --format=coded writes it: scales that suit such files, one for "
        "each output, are chosen from too; in memory such codes take 8 bits",
    )
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "choose the range of each scale by the least squared error")
    rows: int = flag(16, "sequences of the calibration text over which costs are measured or predicted")
    rounder: Literal["gptq", "tuned", "nearest"] = flag("gptq", "the step that rounds, with its usual settings")

    at = "average_bits"
    calibrates = True

    def __post_init__(self):
        require_choices(self)
        require(self.average_bits > 0, f"average_bits is {self.average_bits}, but must be positive")
        require(self.megabytes >= 0, f"megabytes is {self.megabytes}, but must be positive, or 0 for average_bits")
        require(self.rows > 0, f"rows is {self.rows}, but must be positive")
        require(
            not self.coded or self.rounder == "gptq",
            f"rounder is {self.rounder}, but for entropy-coded files (coded) it must be gptq",
        )
        _ = self.formats  # which check themselves

    @property
    def formats(self) -> tuple[Format, ...]:
        groups, bits = self.groups or "32,128", _numbers(self.bits, "bits")
        every = [*itertools.product(_numbers(groups, "groups"), bits)]
        every += [(16, 8)] * (not self.groups and 8 in bits)  # for budgets that are larger than all others can use
        given = {"symmetric": self.symmetric, "clip": self.clip, "coded": self.coded}
        grouped = tuple(
            Format(bits=bits, group=group, super_block=self.super_block if group else 0, **given)
            for group, bits in every
        )
        return grouped + tuple(Format(entropy=entropy) for entropy in ENTROPIES if self.coded)

    @property
    def coarsest(self) -> Format:
        return min(self.formats, key=lambda format: (format.bits, -(format.group or math.inf)))

    def __call__(self, model: LanguageModel, context: Context):
        floats = model.replace(params=trees.map_with_path(lambda _, w: ops.dequantize(w), model.params))
        budget, more, nbytes = self._budget(model, context), 0, math.inf
        while nbytes > budget:
            plan, predicted = self.planned(model, context, more)
            after, _ = ROUNDERS[self.rounder](plan=plan)(floats, context)
            nbytes = ops.stored_nbytes(after.params, after.masks)
            more = nbytes - predicted  # of a rounder that makes fewer zeros than nearest rounding, or rarer codes
        return after, record(self, model, after, context)

    def _budget(self, model: LanguageModel, context: Context) -> int:
        """In bytes."""
        return int(self.megabytes * 1e6 or self.average_bits / 8 * _weights(model, context))

    def plan(self, model: LanguageModel, context: Context) -> Plan:
        """The formats with the least sum of costs within the budget. Raises InputError."""
        return self.planned(model, context)[0]

    def planned(self, model: LanguageModel, context: Context, more: int = 0) -> tuple[Plan, int]:
        """That plan, where files take `more` bytes than predicted, and the bytes predicted. Raises InputError."""
        units, weights, budget = self.measured(model, context), _weights(model, context), self._budget(model, context)
        paths = {path for rows in units for path in rows[0].paths}
        others = {path: w for path, w in trees.flatten(model.params) if path not in paths}
        rest = ops.stored_nbytes(others, model.masks, self.coded)
        # GPTQ's codes take more than those of rounding to the nearest: 0.7% on SmolLM2-135M in 2.5 bits. Rounding each
        # size up to a unit makes up for more than half of it.
        more_each, small = (1.003, max(budget // SMALL_UNITS, 1)) if self.coded else (1, 1)
        nbytes = [[-(-int(row.bytes * more_each) // small) * small for row in rows] for rows in units]
        least = rest + more + sum(map(min, nbytes))
        require(
            least <= budget,
            f"the budget is {budget:,} bytes, {8 * budget / weights:.2f} bits a weight, but the least that these bits "
            f"and groups can take is {least:,}, {8 * least / weights:.2f}: raise it, or let fewer bits be chosen",
        )
        chosen = allocate([[getattr(row, self.cost) for row in rows] for rows in units], nbytes, budget - rest - more)
        rows = [rows[option] for rows, option in zip(units, chosen)]
        plan = Plan(tuple((re.escape(path), row.format) for row in rows for path in row.paths))
        return plan, rest + sum(row.bytes for row in rows)

    def measured(self, model: LanguageModel, context: Context) -> list[tuple[Row, ...]]:
        """The rows of each unit, a row a format, with the cost that the step asks for. They are kept with this value of
        the model: another budget for the same text measures nothing again."""
        kept = vars(model).setdefault("_sensitivities", {})
        same = dataclasses.replace(self, average_bits=1.0, megabytes=0.0, rounder="gptq"), context.seed
        text, found = kept.get(same, (None, None))
        if text is None or text is not context.calibration:
            measure = sensitivity.predicted if self.cost == "predicted" else sensitivity.sensitivity
            told = {name: getattr(self, name) for name in ("rows", "unit")}
            how = {"mesh": context.mesh, "seed": context.seed} | told
            found = list(measure(model, context.calibration, self.formats, **how).units.values())
            kept[same] = context.calibration, found
        return found


def _weights(model: LanguageModel, context: Context) -> int:
    """The weights that bits are counted for, as reports do: an output layer that Rotate made of tied embeddings is none
    of the first model's."""
    copied = context.teacher is not None and context.teacher.config.tied and not model.config.tied
    return trees.count({name: leaf for name, leaf in model.params.items() if not (copied and name == "unembedding")})
