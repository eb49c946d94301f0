"""The answers to tasks, in words and as columns. What a row says of a task is made by evaluate.answers.figures."""

from collections.abc import Sequence
from typing import Any

from efflm.report import numbers
from efflm.report.rows import Row

BY = {"plain": "", "tokens": " divided by its tokens", "bytes": " divided by its bytes"}
READING = (
    "+a/-b: answers that were wrong in the first model and are right in this one, and the reverse (flips); an accuracy "
    "that stays can hide many of both. The accuracy difference is in percentage points, with its 95% interval over "
    "pairs of answers (Bonett and Price 2012); p: McNemar's exact test. A true difference of the detectable size is "
    "found in 80% of such comparisons, at a level of 5%; a smaller one may be missed. KL: nats a token of the choices."
)


def names(rows: Sequence[Row]) -> list[str]:
    """The tasks that a row has figures of."""
    return list(dict.fromkeys(task for row in rows for task in (row.at(("tasks",)) or {})))


def rows_of(rows: Sequence[Row], task: str) -> list[Row]:
    """What rows say of one task."""
    return [Row(row.name, row.tasks[task]) for row in rows if task in (row.at(("tasks",)) or {})]


def caption(task: str, told: Row) -> str:
    """told: what a row says of it."""
    right = f"right is what has the largest log-likelihood{BY[told.by]}"
    if told.kind == "last word":
        right = "right is a last word whose every token is the likeliest"
    return f"{task}: {told.items:,} items; {right}."


# --- figures, as the cells of a table ---------------------------------------------------------------------------------


def accuracy(value: float, error: float | None) -> tuple[str, str]:
    return numbers.percent(value, error, most=1)


def points(value: float, sign: bool = True) -> str:
    """A difference of shares in percentage points."""
    return numbers.fixed(100 * value, 1, sign)


def difference(value: float, interval: Sequence[float]) -> tuple[str, str]:
    return points(value), f"({points(interval[0])} to {points(interval[1])})"


def flips(told: Any) -> str:
    """told: a row's figures of a task, which is not the first row."""
    return f"+{told['flips_to_right']}/-{told['flips_to_wrong']}"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def changes(row: Row, tasks: Sequence[str]) -> list[str]:
    """How many answers changed, and the task that lost the most."""
    if not tasks:
        return []
    told = {task: row.tasks[task] for task in tasks}
    total = lambda figure: sum(each[figure] for each in told.values())
    flipped = f"{total('flips_to_wrong'):,} from right to wrong, {total('flips_to_right'):,} from wrong to right"
    words = f"{total('changed'):,} of {total('items'):,} answers changed, {flipped}"
    if None not in [each["changed_by_rounding"] for each in told.values()]:
        words += f" (float rounding alone changes {total('changed_by_rounding'):,})"
    worst = min(told, key=lambda task: told[task]["accuracy_difference"])
    return [words, f"{'worst task ' if len(told) > 1 else ''}{lost(row, worst)}"]


def lost(row: Row, task: str) -> str:
    """The difference of accuracy on a task."""
    told = row.tasks[task]
    shown, low, high = map(points, (told["accuracy_difference"], *told["interval"]))
    detectable = points(told["minimum_detectable"], sign=False)
    interval = f"95% interval {low} to {high}; detectable from {detectable} on"
    return f"{task}: accuracy {shown} points ({interval}), flips {flips(told)}"


def reason(row: Row, kind: str, task: str, ahead: tuple[float, float | None], first: str) -> str:
    """What another row does better than this one on a task: by how much, and the error of that. first: the name of the
    first row, whose answers are compared with; "" if it is the other row."""
    shown, spread = (text.rstrip("%") for text in numbers.percent(*ahead, most=1))
    by = f"{shown} {spread}".rstrip()
    if kind == "accuracy":
        return f"is more accurate on {task} by {by} points"
    if not first:
        changed, items = (row.tasks[task][figure] for figure in ("changed", "items"))
        return f"is what this one differs from in {changed:,} of {items:,} answers to {task}"
    return f"keeps {first}'s answers to {by} points more of the items of {task}"
