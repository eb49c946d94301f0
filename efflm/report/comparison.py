"""Two models compared by everything that was measured of both, and which differences count.

`better`: by more standard errors than chance explains in any of all comparisons: each pair of rows, in each of
`Comparison.figures`, which are FIGURES and of each task the accuracy and the answers that the first row gives too.
They are the two-sided quantile of Student's t distribution for 5% divided by the number of comparisons (Bonferroni),
since errors are estimated from few documents or rounds; of the normal one where only the rows are known. Of tasks it is
McNemar's exact test at that level. It must also be by more than LIKE in bytes and speed, by more than limits.same of
the first row's loss in loss and divergence, and of the tokens or items elsewhere. `worse`: by one standard error,
however little: what is said to be no worse must not be worse by the figures as they are.

Errors are those of the difference: of quality paired over documents, of tasks over items, of speed over rounds where
both were measured in the same ones. Where they were not, or only the rows are known, both errors are added as
independent.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import special

from efflm.config import flag, require
from efflm.evaluate import answers, quality, throughput
from efflm.evaluate.answers import Answers
from efflm.evaluate.quality import Quality
from efflm.evaluate.scoring import ROUNDED
from efflm.evaluate.throughput import Rate
from efflm.report.rows import PHASES, Row

QUALITIES = {"loss": "bits_per_byte_increase", "divergence": "kl_to_original", "agreement": "top1_agreement"}
FIGURES = (*PHASES, *QUALITIES)  # those that have errors: bytes have none
CHANCE = 0.05  # that any of the differences that count is chance
LIKE = 0.01  # bytes and speeds that differ by less are alike
EXACT = 1e-5  # quality is not compared beyond: sums in float32 are no better

Rates = tuple[Rate, Rate]  # prefill and decode
OfTask = Literal["accuracy", "answers"]  # answers: the share of them that the first row gives too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the verdicts of the report call close"""

    loss: float = flag(0.01, "of models that lose at most this share of the first one's loss the best are named")
    same: float = flag(0.001, "a loss or divergence of at most this share of the first one's loss counts as none")

    def __post_init__(self):
        for name in ("loss", "same"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but must not be negative")
        require(self.same <= self.loss, f"same is {self.same}, but must not be above loss, {self.loss}")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows, the first of which the others are compared with, and what their figures were made of, by name: sums for
    each document; the rates of a row and those of the first row in the same rounds; the answers to each task."""

    rows: Sequence[Row]
    limits: Limits = Limits()
    qualities: Mapping[str, Quality] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, tuple[Rates, Rates]] = dataclasses.field(default_factory=dict)
    answers: Mapping[str, Mapping[str, Answers]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Those that were measured of all rows."""
        found = [row.at(("tasks",)) or {} for row in self.rows]
        return [task for task in found[0] if all(task in each for each in found)]

    @functools.cached_property
    def of_tasks(self) -> dict[str, tuple[OfTask, str]]:
        """{figure: (what of a task, the task)} of those that are compared over items."""
        kinds = {"accuracy on {}": "accuracy", "answers to {}": "answers"}
        return {words.format(task): (kind, task) for task in self.tasks for words, kind in kinds.items()}

    @property
    def figures(self) -> tuple[str, ...]:
        """All that have errors."""
        return (*FIGURES, *self.of_tasks)

    @property
    def count(self) -> int:
        """Of comparisons: each pair of rows in each figure."""
        return len(self.figures) * math.comb(len(self.rows), 2)

    @property
    def chance(self) -> float:
        """That one of the comparisons names a difference where there is none."""
        return CHANCE / max(self.count, 1)

    @property
    def errors(self) -> float:
        """Standard errors beyond which a difference of quality counts."""
        documents = min((len(each.bits) for each in self.qualities.values()), default=0)
        return self._quantile(documents)

    def _quantile(self, observations: int) -> float:
        chance = 1 - self.chance / 2
        if observations < 2:
            return statistics.NormalDist().inv_cdf(chance)
        return float(special.stdtrit(observations - 1, chance))

    def _beyond(self, one: Row, other: Row, figure: str) -> float:
        """Standard errors beyond which a difference of these rows counts."""
        if figure not in PHASES:
            return self.errors
        found = [self.rates[row.name][0][0].rounds for row in (one, other) if row.name in self.rates]
        return self._quantile(min(map(len, found), default=0))

    @property
    def nats(self) -> float:
        """The loss of the first row in nats a token, the unit of divergences."""
        return math.log(self.rows[0].perplexity)

    def better(self, one: Row, other: Row, figure: str) -> bool:
        """Whether `one` is better than `other` in this figure. bytes: a figure too."""
        if figure == "bytes":
            return one.bytes * (1 + LIKE) < other.bytes
        value, error = self.ahead(one, other, figure)
        if figure in self.of_tasks and self._answered(one, other):
            return value > self._enough(figure) and answers.mcnemar(*self._flips(other, one, figure)) < self.chance
        return error is not None and value > max(self._beyond(one, other, figure) * error, self._enough(figure))

    def worse(self, one: Row, other: Row, figure: str) -> bool:
        """Whether `one` may be worse than `other` in this figure."""
        if figure == "bytes":
            return self.better(other, one, figure)
        value, error = self.ahead(other, one, figure)
        return value > max(error or 0.0, math.log1p(LIKE) if figure in PHASES else EXACT)

    def _enough(self, figure: str) -> float:
        whole = {"loss": self.rows[0].bits_per_byte, "divergence": self.nats}
        return math.log1p(LIKE) if figure in PHASES else max(EXACT, self.limits.same * whole.get(figure, 1.0))

    def ahead(self, one: Row, other: Row, figure: str) -> tuple[float, float | None]:
        """By how much `one` is better, negative where it is worse, and the standard error of that, None where it is not
        known: the logarithm of a ratio of speeds, bits per byte, nats a token, or a share of the tokens or items."""
        if figure in PHASES:
            return self._faster(one, other, figure)
        if figure in self.of_tasks:
            return self._righter(one, other, figure)
        values = [figure_of(row, figure)[0] for row in (one, other)]
        if not all(map(math.isfinite, values)):  # what is not finite is worse than all that is
            sound, others = map(math.isfinite, values)
            return (0.0 if sound == others else math.inf if sound else -math.inf), 0.0
        if one.name in self.qualities and other.name in self.qualities:
            value, error = quality.paired_difference(self.qualities[one.name], self.qualities[other.name], figure)
        else:
            errors = [figure_of(row, figure)[1] for row in (one, other)]
            value, error = values[0] - values[1], None if None in errors else math.hypot(*errors)
        return value if figure == "agreement" else -value, error

    def _righter(self, one: Row, other: Row, figure: str) -> tuple[float, float | None]:
        kind, task = self.of_tasks[figure]
        if self._answered(one, other):
            return answers.difference(*self._flips(other, one, figure), one.tasks[task]["items"])
        (mine, error), (theirs, spread) = (of_task(row.tasks[task], kind) for row in (one, other))
        return mine - theirs, None if None in (error, spread) else math.hypot(error, spread)

    def _answered(self, *rows: Row) -> bool:
        """Whether the answers of these rows and of the first are known."""
        return all(row.name in self.answers for row in (self.rows[0], *rows))

    def _flips(self, before: Row, after: Row, figure: str) -> tuple[int, int]:
        """Items with the right answer, or that of the first row, of one row alone: of `before`, of `after`. The answers
        of the first row are those it gives in another precision: from these, rounding alone does not differ."""
        kind, task = self.of_tasks[figure]
        first = self.answers[self.rows[0].name][task]
        by = answers.usual(first)
        names = [ROUNDED if kind == "answers" and row is self.rows[0] else row.name for row in (before, after)]
        own = [answers.chosen(self.answers.get(name, {}).get(task, first), by) for name in names]
        expected = first.labels if kind == "accuracy" else answers.chosen(first, by)
        return answers.flips(*(each == expected for each in own))

    def _faster(self, one: Row, other: Row, phase: str) -> tuple[float, float | None]:
        mine, theirs, at = self.rates.get(one.name), self.rates.get(other.name), PHASES.index(phase)
        if mine and theirs and mine[1] == theirs[1]:  # the same rounds of the first row
            return _log_ratio(mine[0][at], theirs[0][at])
        parts = []
        for row in (one, other):
            own, base = self.rates.get(row.name, (None, None))
            ratio, error = times(row, phase)
            apart = math.log(ratio), None if error is None else error / ratio
            parts.append(_log_ratio(own[at], base[at]) if own else apart)
        error = None if None in [e for _, e in parts] else math.hypot(*(e for _, e in parts))
        return parts[0][0] - parts[1][0], error


def _log_ratio(rate: Rate, base: Rate) -> tuple[float, float | None]:
    """Of the ratio that the table shows (throughput.ratio), and the standard error of such a median, None of a single
    round: by the deviation, since the quartiles of few rounds are often close together by chance."""
    logs = np.log(np.divide(rate.rounds, base.rounds))
    value, count = math.log(throughput.ratio(rate, base)[0]), len(logs)
    return value, float(logs.std(ddof=1) * math.sqrt(math.pi / 2 / count)) if count > 1 else None


def figure_of(row: Row, figure: str) -> tuple[float, float | None]:
    """A row's figure of quality and its error. The first row, which has none, differs from itself in nothing."""
    name = QUALITIES[figure]
    value = getattr(row, name)
    return (float(figure == "agreement"), 0.0) if value is None else (value, getattr(row, f"{name}_stderr"))


def of_task(told: Mapping[str, Any], kind: OfTask) -> tuple[float, float | None]:
    """What a row says of a task (answers.figures) beside the first row, and its error: by how much the accuracy is
    above, or minus the share of the answers that differ. The first row differs from itself in nothing."""
    if told["changed"] is None:
        return 0.0, 0.0
    if kind == "accuracy":
        return told["accuracy_difference"], told["accuracy_difference_stderr"]
    share = told["changed"] / told["items"]
    return -share, math.sqrt(share * (1 - share) / told["items"])


def times(row: Row, phase: str) -> tuple[float, float | None]:
    """How many times the speed of the first row, and its error; of that row itself once, exactly."""
    value = getattr(row, f"{phase}_speedup")
    return (1.0, 0.0) if value is None else (value, getattr(row, f"{phase}_speedup_stderr"))


def protocol(compared: Comparison) -> str:
    """How differences are judged, in words."""
    paired = all(row.name in compared.qualities for row in compared.rows)
    documents = "paired over documents" if paired else "added as independent"
    firsts = [base for _, base in compared.rates.values()]
    rounds = "in the same rounds" if firsts and all(base == firsts[0] for base in firsts) else "each beside the first"
    same = f"{100 * compared.limits.same:g}%"
    items = (
        f" Answers differ where McNemar's exact test gives p < {compared.chance:.2g}, and beyond {same} of the items"
    )
    items += (
        "; from the first model's, beyond what float rounding alone changes." if ROUNDED in compared.answers else "."
    )
    return (
        f"Verdicts: a difference of quality counts beyond {compared.errors:.1f} standard errors, one of speed beyond "
        f"what Student's distribution gives for as few rounds, each for {CHANCE:.0%} in all of {compared.count} "
        f"comparisons (Bonferroni): each pair of rows in {', '.join(compared.figures)}; "
        f"and beyond {LIKE:.0%} of bytes and speed, {same} of the first model's loss (divergence: in nats) and {same} "
        f"of the tokens (agreement). No worse is what is not worse by one standard error. Errors of quality are "
        f"{documents}; speeds are ratios to the first model's, measured {rounds}." + items * bool(compared.tasks)
    )
