"""What the figures say, in words made from them: what is smallest, what is fastest, what is not worth it here.

Speeds differ where the quartiles of both do not overlap. A loss is said to be larger where it is two standard errors
larger, and to be no larger only where it is not by one standard error, or by CLOSE. The errors of two differences to
the same first model are added as if they were independent, which overstates their error.
"""

import dataclasses
import math

from efflm.report import numbers
from efflm.report.rows import Row

WITHIN, CLOSE = 0.01, 0.001  # of the first model's loss
PHASES = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """heading: what was asked; name: of the row that is the answer, "" if there is none."""

    heading: str
    name: str
    words: str


def positive(rows: list[Row]) -> list[Verdict]:
    """The smallest and the fastest of those within WITHIN of the first row's loss, and the smallest within CLOSE of it,
    standard error included. Questions with the same answer are one verdict."""
    first, others = rows[0], rows[1:]
    near = [row for row in others if _over(row) <= WITHIN * first.bits_per_byte]
    same = [row for row in near if _over(row) + _error(row) <= CLOSE * first.bits_per_byte]
    if not near:
        return [Verdict(f"Within {WITHIN:.0%} of the dense loss", "", f"No model: {_nearest(others, first)}")]
    asked = {
        "smallest": _smallest(near, first),
        "fastest prefill": _fastest("prefill", near, first),
        "fastest decode": _fastest("decode", near, first),
    }
    found = []
    for row in {id(row): row for row in asked.values() if row}.values():
        which = [words for words, answer in asked.items() if answer is row]
        others = [each.name for each in near if each is not row and all(_ties(each, row, words) for words in which)]
        heading = f"{_listed(which)} within {WITHIN:.0%} of the dense loss"
        found.append(Verdict(heading[0].upper() + heading[1:], row.name, _described(row, first, others)))
    missing = [words for words, answer in asked.items() if answer is None]
    if missing:
        why = "than the dense model by more than the spread of the measurements"
        comparative = {
            "smallest": "smaller",
            "fastest prefill": "faster in prefill",
            "fastest decode": "faster in decode",
        }
        words = f"No model within {WITHIN:.0%} is {_listed([comparative[each] for each in missing], 'or')} {why}."
        found.append(Verdict(f"{_listed(missing).capitalize()}: the dense model", first.name, words))
    unchanged = _smallest(same, first)
    if unchanged and unchanged is not asked["smallest"]:
        others = [row.name for row in same if row is not unchanged and _ties(row, unchanged, "smallest")]
        heading = f"Smallest within {CLOSE:.1%} of the dense loss, standard error included"
        found.append(Verdict(heading, unchanged.name, _described(unchanged, first, others)))
    return found


def _smallest(rows: list[Row], first: Row) -> Row | None:
    """The smallest, and of several equally small ones that with the least loss; None if the first is as small."""
    least = min((row.bytes for row in rows), default=math.inf)
    if least >= 0.99 * first.bytes:
        return None
    return min((row for row in rows if row.bytes <= 1.01 * least), key=_over)


def _fastest(phase: str, rows: list[Row], first: Row) -> Row | None:
    best = max(rows, key=lambda row: _median(row, phase))
    return best if _faster(best, first, phase) else None


def _ties(row: Row, best: Row, words: str) -> bool:
    """Whether `row` is as good as the best at what was asked."""
    if words == "smallest":
        return row.bytes <= 1.01 * best.bytes
    return not _faster(best, row, words.removeprefix("fastest "))


def _described(row: Row, first: Row, ties: list[str]) -> str:
    words = "; ".join([_size(row, first), *(_speed(row, first, phase) for phase in PHASES), _loss(row, first)])
    return f"{words}." + (f" As good at it: {_listed(ties)}." if ties else "")


def negative(rows: list[Row]) -> list[Verdict]:
    """The rows that another one beats in something, by more than the errors, and that beat it in nothing; and those
    whose loss is beyond WITHIN of the first row's by more than two standard errors."""
    found, limit = [], WITHIN * rows[0].bits_per_byte
    for row in rows[1:]:
        close = CLOSE * rows[0].bits_per_byte
        reasons = {other.name: _beats(other, row, close) for other in rows if other is not row}
        reasons = {name: why for name, why in reasons.items() if why}
        if reasons:
            name = max(reasons, key=lambda each: (len(reasons[each]), each != rows[0].name))
            words = f"{name} {_listed(reasons[name])}."
            found.append(Verdict("Not worth it here", row.name, words))
        elif _over(row) - 2 * _error(row) > limit:
            found.append(Verdict("Not worth it here", row.name, f"{_loss(row, rows[0])}, more than {WITHIN:.0%}."))
    return found


def _beats(other: Row, row: Row, close: float) -> list[str]:
    """What `other` does better than `row`; empty if nothing, or if it is worse in anything. close: losses that differ
    by less, in bits per byte, count as the same."""
    better = []
    if other.bytes > 1.01 * row.bytes or any(_faster(row, other, phase) for phase in PHASES):
        return []
    lost, error = _over(row) - _over(other), math.hypot(_error(row), _error(other))
    if lost < -max(error, close):
        return []
    if other.bytes < 0.99 * row.bytes:
        better.append(f"is {numbers.ratio(row.bytes / other.bytes)} smaller")
    for phase in PHASES:
        if _faster(other, row, phase):
            times = numbers.ratio(_median(other, phase) / _median(row, phase), _spread(other, row, phase))
            better.append(f"is {times} as fast in {phase}")
    if lost > 2 * error and lost > close:
        value, spread = numbers.with_error(lost, error or None)
        better.append(f"loses {' '.join(filter(None, (value, spread)))} bits per byte less")
    return better


def _listed(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _over(row: Row) -> float:
    return row.bits_per_byte_over_dense or 0.0


def _error(row: Row) -> float:
    return row.bits_per_byte_over_dense_stderr or 0.0


def _median(row: Row, phase: str) -> float:
    return getattr(row, f"{phase}_tokens_per_second")


def _range(row: Row, phase: str) -> tuple[float, float]:
    return getattr(row, f"{phase}_spread")


def _faster(one: Row, other: Row, phase: str) -> bool:
    return _range(one, phase)[0] > _range(other, phase)[1]


def _spread(one: Row, other: Row, phase: str) -> float:
    half = lambda row: (_range(row, phase)[1] - _range(row, phase)[0]) / 2 / _median(row, phase)
    return math.hypot(half(one), half(other))


def _size(row: Row, first: Row) -> str:
    times = first.bytes / row.bytes
    if 0.99 < times < 1.01:
        return "as large"
    return f"{numbers.ratio(times)} smaller" if times > 1 else f"{numbers.ratio(1 / times)} larger"


def _speed(row: Row, first: Row, phase: str) -> str:
    if not (_faster(row, first, phase) or _faster(first, row, phase)):
        return f"{phase} as fast, within the spread"
    times = numbers.ratio(_median(row, phase) / _median(first, phase), _spread(row, first, phase))
    return f"{phase} {times} as fast"


def _loss(row: Row, first: Row) -> str:
    over, error = 100 * _over(row) / first.bits_per_byte, 100 * _error(row) / first.bits_per_byte
    if row.bits_per_byte_over_dense_stderr is None:
        return f"loss {numbers.fixed(over, 2, sign=True)}%, of one document, so without an error"
    value, spread = numbers.with_error(over, error, sign=True, most=3)
    words = f"loss {value}% {spread}%"
    if abs(over) <= 2 * error:
        return f"{words}: no difference beyond two standard errors"
    return f"{words}; two standard errors reach beyond the limit" if over + 2 * error > 100 * WITHIN >= over else words


def _nearest(rows: list[Row], first: Row) -> str:
    row = min(rows, key=_over)
    return f"the nearest is {row.name}, {_loss(row, first)}."
