"""The search for the best candidate within an allowed loss: ever fewer read ever more of the selection text (successive
halving: Jamieson 2016, arXiv 1502.07943), and the best are tested on another text, which decides nothing but whether
they are accepted (evaluate.acceptance)."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from efflm.evaluate import acceptance, quality
from efflm.evaluate.quality import Figure, Quality

FIRST = "before"  # the name of the first model
NEAR = 0.04  # settings that differ by a smaller share have none between them
FINALISTS = 3  # candidates that are tested after each round, at most
UNSEEN = "unseen"  # the name of the acceptance text; the parts of the selection text are numbered from 0


@dataclasses.dataclass
class Search:
    """The candidates by name, and what is known of them.

    sums: {name: {text: {field of Quality: list}}}, costs: {name: what is to be small}, tests: those of the acceptance
    text so far, in their order; all as JSON has them, and all that a search needs to go on. allowed: the increase of
    the loss, as a share; most: the cost, where the least loss is wanted in place of that. measure(name, text) reads
    one unless there is no time left for it (None). flips(name): how many answers are right in one model and wrong in
    the other, and of how many, of which at most the share allowed_flips may be; None where no tasks are given.
    say(name): called when a candidate has read a part more; kept(): when a figure is new.
    """

    parts: int
    allowed: float
    most: float
    sums: dict[str, dict[str, Any]]
    costs: dict[str, float]
    tests: list[dict[str, Any]]
    measure: Callable[[str, str], Quality | None]
    say: Callable[[str], None]
    kept: Callable[[], None]
    flips: Callable[[str], tuple[int, int]] | None = None
    allowed_flips: float = 1.0

    @property
    def by_loss(self) -> bool:
        return self.most < math.inf

    @property
    def best(self) -> dict[str, Any] | None:
        """The test of the best candidate that was accepted."""
        key = (lambda test: test["bound"]) if self.by_loss else (lambda test: self.costs[test["name"]])
        return min((test for test in self.tests if test["accepted"]), key=key, default=None)

    def read(self, name: str, text: str) -> Quality | None:
        """The sums of a candidate on a text, which is read unless that was done."""
        known = self.sums.setdefault(name, {})
        if text not in known:
            found = self.measure(name, text)
            if found is None:
                return None
            known[text] = {field: np.asarray(values).tolist() for field, values in vars(found).items()}
            self.kept()
            if name != FIRST and text != UNSEEN:
                self.say(name)
        return Quality(**{field: np.array(values) for field, values in known[text].items()})

    def selected(self, name: str) -> tuple[Quality, Quality]:
        """The sums of a candidate and of the first model over the parts of the selection text that the one has read."""
        texts = [text for text in map(str, range(self.parts)) if text in self.sums[name]]
        return tuple(acceptance.joined([self.read(each, text) for text in texts]) for each in (name, FIRST))

    def increase(self, name: str) -> Figure:
        """Over what it has read."""
        return quality.relative_increase(*self.selected(name))

    def good(self, name: str) -> bool:
        """Whether it would probably be accepted."""
        value, error = self.increase(name)
        return value + acceptance.PLAUSIBLE * (error or 0.0) <= self.allowed

    def ranked(self, names: Sequence[str]) -> list[str]:
        """Those that may keep to what is allowed, the best first."""
        figures = [self.increase(name) for name in names]
        costs = [self.costs[name] for name in names]
        return [names[i] for i in acceptance.promising(costs, figures, self.allowed, self.by_loss)]

    def halve(self, names: Sequence[str]) -> None:
        """Have candidates read the selection text, part by part and half as many each time."""
        for text in map(str, range(self.parts)):
            names = [name for name in names if self.read(name, text)]
            names = self.ranked(names)[: max(FINALISTS, math.ceil(len(names) / 2))]

    def accept(self) -> Iterator[dict[str, Any]]:
        """Test the best of those that have read all of the selection text, in an order that this text alone decides,
        the safest first; gives each test. A candidate that would be of no use keeps its place in the order."""
        fit = [name for name, cost in self.costs.items() if cost <= self.most and name != FIRST]
        whole = [name for name in fit if len(self.sums.get(name, {}).keys() - {UNSEEN}) == self.parts]
        chosen = [name for name in self.ranked(whole) if self.good(name)][:FINALISTS]
        new = [name for name in chosen if name not in [test["name"] for test in self.tests]]
        for name in sorted(new, key=lambda name: self.increase(name)[0]):
            level = acceptance.level([test["accepted"] and not self.by_loss for test in self.tests])
            test = {"name": name, "level": level, "increase": None, "bound": None, "accepted": False}
            if self.by_loss or not self.best or self.costs[name] < self.costs[self.best["name"]]:
                own, first = self.read(name, UNSEEN), self.read(FIRST, UNSEEN)
                test["increase"] = quality.relative_increase(own, first)
                test["bound"] = acceptance.bound(test["increase"], len(own.bits), level)
                test["accepted"] = math.isfinite(test["bound"]) and test["bound"] <= self.allowed
                if test["accepted"] and self.flips:  # both must hold, each at this level
                    test["flips"] = self.flips(name)
                    test["flips_bound"] = acceptance.share_bound(*test["flips"], level)
                    test["accepted"] = test["flips_bound"] <= self.allowed_flips
            self.tests.append(test)
            self.kept()
            yield test


def between(names: Sequence[str], good: Callable[[str], bool]) -> list[str]:
    """Names with a number after an @ halfway between those of two that differ in it alone, and of which one is good."""
    families: dict[str, dict[float, str]] = {}
    for name in names:
        for found in re.finditer(r"@(\d+(?:\.\d+)?)(?![\d:.])", name):
            family = f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}"
            families.setdefault(family, {})[float(found[1])] = name
    out = {}
    for family, members in families.items():
        for low, high in itertools.pairwise(sorted(members)):
            if good(members[low]) != good(members[high]) and high - low > NEAR * high:
                out[family.format(f"{(low + high) / 2:.3g}")] = None
    return [name for name in out if name not in names]
