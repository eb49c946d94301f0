"""What the figures say, in words made from them: what is smallest and fastest, what is not worth it on this machine.

Everything that was measured of a row counts: bytes, speed, loss, divergence, agreement and the answers to tasks. Which
differences count, and the correction for so many comparisons, is in report.comparison.
"""

import dataclasses
import math

from efflm.report import comparison, numbers, tasks
from efflm.report.comparison import PHASES, Comparison
from efflm.report.rows import Row


@dataclasses.dataclass(frozen=True)
class Verdict:
    """heading: what was asked; name: of the row that is the answer, "" if there is none."""

    heading: str
    name: str
    words: str


# What is asked: the figure that answers it, and what a model is that is better in it.
ASKED = {
    "smallest": ("bytes", "smaller"),
    "fastest prefill": ("prefill", "faster in prefill"),
    "fastest decode": ("decode", "faster in decode"),
}


def positive(compared: Comparison) -> list[Verdict]:
    """The smallest and the fastest of those within limits.loss of the first row's loss that are less accurate on no
    task; where the divergence of these is beyond it, those of the rows whose divergence is not; and the smallest whose
    loss and divergence are within limits.same, errors included, and that changes no more answers than rounding. Of
    equally small or fast ones the answer is the one that the others beat in the fewest figures. Questions with the same
    answer are one verdict."""
    first, *others = compared.rows
    within, same = (_percent(limit) for limit in (compared.limits.loss, compared.limits.same))
    near = [row for row in others if _over(row) <= compared.limits.loss * first.bits_per_byte]
    near = [row for row in near if not _less_accurate(row, compared)]
    accurate = f"within {within} of the original's loss" + ", no task's accuracy lower beyond chance" * bool(
        compared.tasks
    )
    if not near:
        return [Verdict(accurate.capitalize(), "", f"No model: {_nearest(others, compared)}")]
    asked = {words: _best(near, words, compared) for words in ASKED}
    found = _answers(asked, near, accurate, compared)
    missing = [words for words, answer in asked.items() if answer is None]
    if missing:
        why = "than the original by more than the errors of the measurements"
        words = f"No model within {within} is {_listed([ASKED[each][1] for each in missing], 'or')} {why}."
        found.append(Verdict(f"{_listed(missing).capitalize()}: the original", first.name, words))
    alike = [row for row in near if comparison.figure_of(row, "divergence")[0] <= compared.limits.loss * compared.nats]
    unchanged = [row for row in near if _unchanged(row, compared)]
    told = {"smallest": _best(unchanged, "smallest", compared)}
    again = {words: _best(alike, words, compared) for words in ASKED}
    again = {words: row for words, row in again.items() if row not in (asked[words], told.get(words))}
    found += _answers(again, alike, f"within {within} of the original's loss, divergence included", compared)
    if told["smallest"] is not asked["smallest"]:
        where = f"within {same} of the original's loss, divergence and errors included"
        where += ", no more answers changed than by float rounding" * bool(compared.tasks)
        found += _answers(told, unchanged, where, compared)
    return found


def _answers(asked: dict[str, Row | None], rows: list[Row], where: str, compared: Comparison) -> list[Verdict]:
    """A verdict for each row that is an answer; rows: of which it is the best."""
    found = []
    for row in {id(row): row for row in asked.values() if row}.values():
        which = [words for words, answer in asked.items() if answer is row]
        heading = f"{_listed(which)} {where}"
        words = _described(row, _ties(rows, row, which, compared), compared)
        found.append(Verdict(heading[0].upper() + heading[1:], row.name, words))
    return found


def _unchanged(row: Row, compared: Comparison) -> bool:
    """Whether loss and divergence are within limits.same of the first row's loss, errors included, and no task has more
    answers changed than float rounding alone changes."""
    if any(row.tasks[task]["changed"] > (row.tasks[task]["changed_by_rounding"] or 0) for task in compared.tasks):
        return False
    most = {"loss": compared.rows[0].bits_per_byte, "divergence": compared.nats}
    found = {figure: comparison.figure_of(row, figure) for figure in most}
    return all(
        value + compared.errors * (error or 0.0) <= compared.limits.same * most[figure]
        for figure, (value, error) in found.items()
    )


def _best(rows: list[Row], words: str, compared: Comparison) -> Row | None:
    """The smallest or fastest; None if there is none that is smaller or faster than the first."""
    figure, first = ASKED[words][0], compared.rows[0]
    rows = [row for row in rows if compared.better(row, first, figure)]
    if not rows:
        return None
    rank = (lambda row: row.bytes) if figure == "bytes" else (lambda row: -comparison.times(row, figure)[0])
    most = min(rows, key=rank)
    equal = [row for row in rows if not compared.better(most, row, figure)]
    beaten = lambda row: sum(compared.better(other, row, each) for other in equal for each in compared.figures)
    return min(equal, key=lambda row: (beaten(row), _over(row)))


def _ties(rows: list[Row], best: Row, which: list[str], compared: Comparison) -> list[str]:
    """The names of the rows that are as good at what was asked, and what they are worse in than the best."""
    out = []
    for row in rows:
        if row is best or any(compared.better(best, row, ASKED[words][0]) for words in which):
            continue
        worse = [figure for figure in ("bytes", *compared.figures) if compared.better(best, row, figure)]
        out.append(row.name + (f" (worse in {_listed(worse)})" if worse else ""))
    return out


def _described(row: Row, ties: list[str], compared: Comparison) -> str:
    speeds = [_speed(row, phase, compared) for phase in PHASES]
    words = "; ".join([_size(row, compared.rows[0]), *speeds, _loss(row, compared), *_likeness(row, compared)])
    return f"{words}." + (f" As good at it: {_listed(ties)}." if ties else "")


def negative(compared: Comparison) -> list[Verdict]:
    """The rows that another one is better than in something and worse than in nothing; and those whose loss is beyond
    limits.loss of the first row's, errors included, or not finite, or that are less accurate on a task."""
    first, found = compared.rows[0], []
    limit, within = compared.limits.loss * first.bits_per_byte, _percent(compared.limits.loss)
    for row in compared.rows[1:]:
        reasons = {other.name: _beats(other, row, compared) for other in compared.rows if other is not row}
        reasons = {name: why for name, why in reasons.items() if why}
        if reasons:
            name = max(reasons, key=lambda each: (len(reasons[each]), each != first.name))
            found.append(Verdict("Not worth it on this machine", row.name, f"{name} {_listed(reasons[name])}."))
        elif not math.isfinite(row.bits_per_byte):
            found.append(Verdict("Not worth it on this machine", row.name, "its loss is not finite."))
        elif _over(row) - compared.errors * _error(row) > limit:
            words = f"{_loss(row, compared)}, more than {within}."
            found.append(Verdict("Not worth it on this machine", row.name, words))
        elif lost := _less_accurate(row, compared):
            words = f"less accurate, beyond chance: {_listed([tasks.lost(row, task) for task in lost])}."
            found.append(Verdict("Not worth it on this machine", row.name, words))
    return found


def _less_accurate(row: Row, compared: Comparison) -> list[str]:
    """The tasks on which the first row is more accurate, beyond chance."""
    accuracies = {figure: task for figure, (kind, task) in compared.of_tasks.items() if kind == "accuracy"}
    return [task for figure, task in accuracies.items() if compared.better(compared.rows[0], row, figure)]


def _beats(other: Row, row: Row, compared: Comparison) -> list[str]:
    """What `other` does better than `row`; empty if nothing, or if it is worse in anything."""
    if any(compared.worse(other, row, figure) for figure in ("bytes", *compared.figures)):
        return []
    better = [figure for figure in compared.figures if compared.better(other, row, figure)]
    kinds = {figure: compared.of_tasks[figure] for figure in better if figure in compared.of_tasks}
    told = {("answers", task) for kind, task in kinds.values() if kind == "accuracy"}  # the accuracy tells enough
    found = [_reason(other, row, figure, compared) for figure in better if kinds.get(figure) not in told]
    smaller = compared.better(other, row, "bytes")
    return [f"is {numbers.ratio(row.bytes / other.bytes)} smaller"] * smaller + found


def _reason(other: Row, row: Row, figure: str, compared: Comparison) -> str:
    value, error = compared.ahead(other, row, figure)
    if figure in PHASES:
        return f"is {numbers.ratio(math.exp(value), error or 0.0)} as fast in {figure}"
    if not math.isfinite(value):
        return f"has a finite {figure}"
    if figure in compared.of_tasks:
        first = compared.rows[0].name if other is not compared.rows[0] else ""
        return tasks.reason(row, *compared.of_tasks[figure], (value, error), first)
    shown, spread = numbers.with_error(value, error)
    if figure == "loss":
        return f"loses {_joined(shown, spread)} bits per byte less"
    if other is compared.rows[0]:  # which diverges from itself in nothing: that alone is no merit
        if figure == "divergence":
            return f"is what this one diverges from, by {_joined(shown, spread)} nats a token"
        return f"is what this one differs from in {_joined(*numbers.percent(value, error))} of the likeliest tokens"
    if figure == "divergence":
        return f"diverges from {compared.rows[0].name} by {_joined(shown, spread)} nats a token less"
    shown = _joined(*numbers.percent(value, error))
    return f"agrees with {compared.rows[0].name} on the likeliest token at {shown} more of the tokens"


def _listed(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _joined(shown: str, beside: str) -> str:
    """A figure and its error; what is 0 exactly is "exactly 0"."""
    return f"{beside} {shown}" if beside == "exactly" else f"{shown} {beside}".rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _over(row: Row) -> float:
    return comparison.figure_of(row, "loss")[0]


def _error(row: Row) -> float:
    return comparison.figure_of(row, "loss")[1] or 0.0


def _size(row: Row, first: Row) -> str:
    ratio = first.bytes / row.bytes
    if 1 / (1 + comparison.LIKE) <= ratio <= 1 + comparison.LIKE:
        return "as large"
    return f"{numbers.ratio(ratio)} smaller" if ratio > 1 else f"{numbers.ratio(1 / ratio)} larger"


def _speed(row: Row, phase: str, compared: Comparison) -> str:
    first = compared.rows[0]
    if not (compared.better(row, first, phase) or compared.better(first, row, phase)):
        return f"{phase} as fast, within the errors"
    value, error = comparison.times(row, phase)
    return f"{phase} {numbers.ratio(value, (error or 0.0) / value)} as fast"


def _loss(row: Row, compared: Comparison) -> str:
    whole, limit = compared.rows[0].bits_per_byte, compared.limits.loss
    over, error = _over(row) / whole, _error(row) / whole
    if row.bits_per_byte_increase_stderr is None:
        return f"loss {numbers.fixed(100 * over, 2, sign=True)}%, of one document, so without an error"
    words = f"loss {_joined(*numbers.percent(over, error, sign=True, most=3))}"
    if abs(over) <= compared.errors * error:
        return f"{words}: no difference beyond {compared.errors:.1f} standard errors"
    reaches = over + compared.errors * error > limit >= over
    return f"{words}; {compared.errors:.1f} standard errors reach beyond the limit" if reaches else words


def _likeness(row: Row, compared: Comparison) -> list[str]:
    """Divergence, agreement and answers in words."""
    divergence = _joined(*numbers.with_error(*comparison.figure_of(row, "divergence")))
    agreement = _joined(*numbers.percent(*comparison.figure_of(row, "agreement")))
    noise = [compared.rows[0].at(("noise", f"kl_to_original{end}")) for end in ("", "_stderr")]
    alone = "" if noise[0] is None else f" (float rounding alone: {_joined(*numbers.with_error(*noise))})"
    words = [f"divergence {divergence} nats a token{alone}", f"the same likeliest token at {agreement} of the tokens"]
    return [*words, *tasks.changes(row, compared.tasks)]


def _nearest(rows: list[Row], compared: Comparison) -> str:
    row = min(rows, key=lambda row: (not math.isfinite(_over(row)), _over(row)))
    return f"the nearest is {'; '.join([f'{row.name}, {_loss(row, compared)}', *_likeness(row, compared)])}."
