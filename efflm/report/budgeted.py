"""A search within an allowed loss, in lines, in a table and as a Pareto front."""

import math
from collections.abc import Mapping
from typing import Any

from efflm.evaluate import acceptance, quality
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FIRST, Search
from efflm.report import numbers, plots
from efflm.report.plots import Chart, Point
from efflm.report.rows import Row, with_errors
from efflm.report.table import figure

TARGETS = {  # of each, its figure, what that is, how it is written, and the unit of an axis
    "bytes": ("bytes", "MB on disk", numbers.megabytes, 1e6),
    "memory": ("resident_bytes", "MB in memory", numbers.megabytes, 1e6),
    "latency": ("time_ratio", "times the first model's time", "{:.2f}".format, 1.0),
}


def percent(value: float, error: float | None = None) -> str:
    return " ".join(filter(None, numbers.percent(value, error, sign=True)))


def cost(target: str, value: float) -> str:
    _, unit, form, _ = TARGETS[target]
    return f"{form(value)} {unit}"


def words(search: Search, target: str, name: str) -> str:
    """What is known of a candidate so far."""
    increase, documents = percent(*search.increase(name)), len(search.selected(name)[0].bits)
    return f"{name}: {cost(target, search.costs[name])}, loss {increase} over {documents} documents"


def tested(test: Mapping[str, Any], allowed: float) -> str:
    """What the unseen text said of a candidate."""
    if test["bound"] is None:
        return f"{test['name']}: not tested, since one that was accepted is as good"
    within = "" if math.isinf(allowed) else f" ({percent(allowed)} is allowed)"
    verdict = "accepted" if test["accepted"] else "refused"
    sure = f"below {percent(test['bound'])} with {1 - test['level']:.2%} confidence"
    flips = ""
    if "flips" in test:
        flips = "; {} of {} answers flip".format(*test["flips"]) + f", below {100 * test['flips_bound']:.2g}%"
    return f"{verdict} {test['name']}: on unseen text loss {percent(*test['increase'])}, {sure}{within}{flips}"


def outcome(search: Search, target: str) -> str:
    """What was found, in words."""
    best = search.best
    if not best:
        return "nothing was accepted: the best model within what is allowed is the model as it is"
    return (
        f"the best accepted is {best['name']}: {cost(target, search.costs[best['name']])}, "
        f"loss {percent(*best['increase'])} on unseen text, below {percent(best['bound'])}"
    )


def checked(text: str, own: Quality, first: Quality, allowed: float, times: int) -> dict[str, Any]:
    """The accepted model on a third text: the increase, and in how many resamplings of its documents it is within what
    was allowed."""
    increase, share = quality.relative_increase(own, first), acceptance.held(own, first, allowed, times)
    said = f"on {text}: loss {percent(*increase)}, within what is allowed in {share:.0%} of {times} resamplings"
    return {"words": said, "increase": increase, "documents": len(own.bits), "held": share, "resamplings": times}


def rows(search: Search, target: str) -> list[Row]:
    """The first model, and the candidates that have read selection text, by what they cost."""
    tests, out = {test["name"]: test for test in search.tests if test["increase"]}, []
    for name in sorted((name for name in search.costs if search.sums.get(name)), key=search.costs.get):
        own, first = search.selected(name)
        test = tests.get(name, {"increase": (None, None), "bound": None, "level": None, "accepted": None})
        verdict = {True: "accepted", False: "refused", None: "the first model" if name == FIRST else "not tested"}
        figures = {TARGETS[target][0]: search.costs[name], "documents": len(own.bits)}
        figures |= {"verdict": verdict[test["accepted"]], "bound_share": test["bound"], "level": test["level"]}
        over = {"selection_share": search.increase(name), "unseen_share": test["increase"]}
        over |= {"bits_per_byte_increase": quality.paired_difference(own, first)}
        out.append(Row(name, figures | with_errors(over)))
    return out


def columns(target: str) -> list[Any]:
    name, unit, form, _ = TARGETS[target]
    signed = lambda value, error: numbers.percent(value, error, sign=True)
    return [
        figure("candidate", "name", str),
        figure(unit, name, form),
        figure("loss, selection text", "selection_share", signed, "selection_share_stderr"),
        figure("documents", "documents", str),
        figure("loss, unseen text", "unseen_share", signed, "unseen_share_stderr"),
        figure("at most", "bound_share", percent),
        figure("verdict", "verdict", str),
    ]


def front(found: list[Row], target: str) -> Chart:
    """Loss on the selection text against the target, and which candidates no other beats in both."""
    name, unit, _, scale = TARGETS[target]
    points = [
        Point(
            row.name, row.at(name) / scale, row.bits_per_byte_increase, row.bits_per_byte_increase_stderr,
            f"{row.name}: {cost(target, row.at(name))}, loss {percent(row.selection_share)}, {row.verdict}",
        )
        for row in sorted(found, key=lambda row: row.name != FIRST)
    ]  # fmt: skip
    drawn, best = plots.tradeoff(points, unit)
    listed = f"Loss on the selection text. Not beaten there: {', '.join(each.name for each in best)}."
    return plots.chart(drawn, f"{listed} {len(points)} models.", listed)
