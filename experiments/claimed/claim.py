"""A claim of the literature as data, with a rule for each of its effects, and the verdict on what was measured.

The rule is written before the run and nothing here can be set: an effect is supported if the whole interval of 95% of
its mean over seeds (Student's t) lies on the claimed side of the bound, not supported if the whole interval lies on the
other, else undecided. At three seeds that is 2.5 standard deviations of the seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import special

from efflm.config import require

CONFIDENCE, POWER = 0.95, 0.8
LEAST_SEEDS, MOST_SEEDS = 3, 100  # for a verdict; named as what a verdict would take
Verdict = Literal["supported", "not supported", "undecided"]


@dataclasses.dataclass(frozen=True)
class Effect:
    """A figure that a claim is about. name: its words and unit, and its key in what the claim measures. above, below:
    the bound, and on which side of it the claim has the figure; neither: for the record, without a verdict."""

    name: str
    above: float | None = None
    below: float | None = None

    @property
    def rule(self) -> str:
        return "" if self.bound is None else f"{'>' if self.below is None else '<'} {self.bound:g}"

    @property
    def bound(self) -> float | None:
        return self.below if self.above is None else self.above

    def __post_init__(self):
        require(self.above is None or self.below is None, f"{self.name}: give one bound, above or below")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """statement, source: what the literature says, and where. question, protocol: what is asked here, and how. minutes:
    of three seeds at the default sizes on two cores. measure: (lab, seed) -> {name of an effect: its figure}."""

    number: int
    statement: str
    source: str
    question: str
    protocol: str
    effects: tuple[Effect, ...]
    minutes: float
    measure: Callable[[Any, int], dict[str, float]]

    @property
    def rules(self) -> dict[str, str]:
        return {effect.name: effect.rule for effect in self.effects}


@dataclasses.dataclass(frozen=True)
class Finding:
    """mean, deviation: over seeds, None where not known. detectable: how far from the bound an effect must be to be
    found with a chance of 80%. takes: what a verdict would take, "" if there is one."""

    mean: float | None
    deviation: float | None
    detectable: float | None
    verdict: Verdict | Literal["recorded"]
    takes: str = ""


def judged(effect: Effect, values: Sequence[float]) -> Finding:
    """What the measured values, one a seed, say of an effect."""
    count = len(values)
    if not count or not np.all(np.isfinite(values)):
        takes = "a run that does not diverge" if count else "a run"
        return Finding(None, None, None, "undecided" if effect.rule else "recorded", takes)
    deviation = float(np.std(values, ddof=1)) if count > 1 else None
    found = functools.partial(Finding, float(np.mean(values)), deviation)
    if not effect.rule:
        return found(None, "recorded")
    if count < LEAST_SEEDS:
        return found(None, "undecided", f"{LEAST_SEEDS} seeds at least")
    found = functools.partial(found, half(deviation, count, POWER))
    beyond, margin = (np.mean(values) - effect.bound) * (1 if effect.below is None else -1), half(deviation, count)
    if beyond > margin:  # on the claimed side
        return found("supported")
    if beyond <= -margin:
        return found("not supported")
    needed = next((n for n in range(count + 1, MOST_SEEDS + 1) if half(deviation, n) < abs(beyond)), None)
    larger = f"over {MOST_SEEDS} seeds, so larger models or more steps"
    return found("undecided", f"about {needed} seeds" if needed else larger)


def half(deviation: float, seeds: int, power: float = 0.5) -> float:
    """Half of the interval of a mean over seeds; with a power, the distance from a bound that is found so often."""
    quantile = lambda share: float(special.stdtrit(seeds - 1, share))
    return (quantile((1 + CONFIDENCE) / 2) + quantile(power)) * deviation / math.sqrt(seeds)


def concluded(verdicts: Sequence[str]) -> Verdict:
    """Of a whole claim: supported if all its effects are, not supported if one of them is not."""
    verdicts = [each for each in verdicts if each != "recorded"]
    if "not supported" in verdicts:
        return "not supported"
    return "supported" if verdicts and all(each == "supported" for each in verdicts) else "undecided"


def findings(claim: Claim, seeds: Mapping[str, Mapping[str, float | None]]) -> dict[str, Finding]:
    """{name of an effect: its finding}. seeds: {seed: {name: figure}}, as results.json has them."""
    figures = lambda name: [math.nan if found[name] is None else found[name] for found in seeds.values()]
    return {effect.name: judged(effect, figures(effect.name)) for effect in claim.effects}
