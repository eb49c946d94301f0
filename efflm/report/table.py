"""Tables: what their columns show, and how they look in the terminal. The page (report.page) shows the same ones."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from efflm.report import comparison, numbers, tasks

NONE = "—"  # what stands for a figure that was not measured


Name = str | tuple[str, ...]  # of a figure, or of what lies in one: see Row.at


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table of rows.Row.

    text: a row's figure, or the figure and what stands beside it: its error, range or unit. value: what to sort by;
    None: the text. group: what the column belongs to, named above it. best: which way it is better; such figures are
    also shown as ratios to those of the first row. ratio: gives that ratio and its error where it was measured as such:
    then rows are sorted by it. figures: the names of what is shown (as of Row.at), first the figure itself.
    """

    heading: str
    text: Callable[[Any], str | tuple[str, str]]
    value: Callable[[Any], float | None] | None = None
    group: str = ""
    best: Literal["", "smallest", "largest"] = ""
    ratio: Callable[[Any], tuple[float, float | None]] | None = None
    figures: tuple[Name, ...] = ()

    def pair(self, row: Any) -> tuple[str, str]:
        shown = self.text(row)
        return (shown, "") if isinstance(shown, str) else shown

    def data(self, row: Any) -> dict[str, Any]:
        """What a download has of the row: its figures by name, at full precision."""
        if not self.figures:
            return {self.heading: self.value(row) if self.value else self.pair(row)[0]}
        return {name if isinstance(name, str) else ".".join(name): row.at(name) for name in self.figures}


Columns = Sequence[Column]


def figure(
    heading: str, name: Name, form: Callable[..., str | tuple[str, str]], beside: Name = "",
    none: str | Callable[[Any], str | tuple[str, str]] = NONE, least: float | None = None, **more: Any,
) -> Column:  # fmt: skip
    """The column of the figure of this name, written by form(figure), or form(figure, its error or range `beside`).

    none: what stands for a figure that a row does not have, which is sorted as `least`, or last. more: of Column.
    """
    more = {"figures": tuple(filter(None, (name, beside)))} | more

    def text(row: Any) -> str | tuple[str, str]:
        value = row.at(name)
        if value is None:
            return none if isinstance(none, str) else none(row)
        return form(value, row.at(beside)) if beside else form(value)

    def value(row: Any) -> float | None:
        found = row.at(name)
        return least if found is None else found

    return Column(heading, text, None if form is str else value, **more)


def _parameters(row: Any) -> tuple[str, str]:
    zeros = row.nonzeros is not None and row.nonzeros < 0.99 * row.parameters
    return numbers.millions(row.parameters), f"{numbers.millions(row.nonzeros)} non-zero" if zeros else ""


def _speed(phase: str) -> Column:
    figures, ratio = f"{phase}_tokens_per_second", lambda row: comparison.times(row, phase)
    shown = (figures, f"{phase}_spread", f"{phase}_speedup", f"{phase}_speedup_stderr")
    more = {"group": "speed", "best": "largest", "ratio": ratio, "figures": shown}
    return figure(f"{phase} tok/s", figures, numbers.with_range, f"{phase}_spread", **more)


def _reference(alone: str | None) -> str | tuple[str, str]:
    """What the first row has in place of a difference. alone: what float rounding alone changes, if that is known."""
    return "reference" if alone is None else ("reference", f"(rounding alone: {alone})")


def _quality(heading: str, name: str, form: Callable[..., tuple[str, str]], least: float = 0.0) -> Column:
    """least: that of the first row, which such figures refer to. Beside it stands what float rounding alone does."""

    def none(row: Any) -> str | tuple[str, str]:
        if row.figures.get("bits_per_byte_increase") is not None:
            return NONE
        alone = row.at(("noise", name))
        return _reference(None if alone is None else form(alone, row.at(("noise", f"{name}_stderr")))[0])

    more = {"none": none, "least": least, "group": "quality, ± standard error"}
    return figure(heading, name, form, f"{name}_stderr", **more)


BITS = figure("bits a weight", "bits_a_weight", "{:.2f}".format, group="size")  # see rows.BITS
COLUMNS: Columns = (  # of the rows of rows.make
    figure("model", "name", str),
    Column("parameters", _parameters, lambda row: row.parameters, "size", figures=("parameters", "nonzeros")),
    figure("MB on disk", "bytes", numbers.megabytes, group="size", best="smallest"),
    BITS,
    figure("compute dtype", "precision", str, group="speed"),
    _speed("prefill"),
    _speed("decode"),
    _quality("bits/byte", "bits_per_byte", numbers.with_error),
    _quality("increase over the original", "bits_per_byte_increase", numbers.signed),
    _quality("perplexity", "perplexity", numbers.perplexity),
    _quality("KL to the original", "kl_to_original", numbers.with_error),
    _quality("same top-1", "top1_agreement", numbers.percent, 1.0),
)


OF_TEXT = (  # what a row may have of each of several texts, in its figure `domains`: {text: {name: figure}}
    ("bits/byte", "bits_per_byte", numbers.with_error),
    ("increase over the original", "bits_per_byte_increase", numbers.signed),
    ("KL to the original", "kl_to_original", numbers.with_error),
)


def columns(rows: Sequence[Any]) -> Columns:
    """COLUMNS, and those of what only some rows have."""
    return (*COLUMNS, *map(of_task, tasks.names(rows)), *of_texts(rows))


def of_task(task: str) -> Column:
    """The accuracy on a task, and the flips."""
    at = lambda name: ("tasks", task, name)

    def text(row: Any) -> str | tuple[str, str]:
        if (told := row.at(("tasks", task))) is None:
            return NONE
        shown, spread = tasks.accuracy(told["accuracy"], told["accuracy_stderr"])
        return shown, spread if told["changed"] is None else f"{spread} {tasks.flips(told)}".strip()

    shown = ("accuracy", "accuracy_stderr", "accuracy_difference", "interval", "mcnemar_p")
    shown += ("flips_to_right", "flips_to_wrong", "changed")
    group = "accuracy, ± standard error, flips +to right/-to wrong"
    return Column(task, text, lambda row: row.at(at("accuracy")), group, figures=tuple(map(at, shown)))


def of_texts(rows: Sequence[Any]) -> Columns:
    """The columns of what the rows have of each of several texts."""
    texts = dict.fromkeys(text for row in rows for text in row.figures.get("domains") or {})
    every = [
        figure(heading, path, form, (*path[:-1], f"{name}_stderr"), group=f"text: {text}")
        for text in texts
        for heading, name, form in OF_TEXT
        for path in [("domains", text, name)]
    ]
    return known(rows, every)


def _alone(figure: str, form: Callable[..., str]) -> Callable[[Any], str | tuple[str, str]]:
    return lambda row: _reference(None if row.at(figure) is None else form(row.at(figure)))


def _calibration(row: Any) -> str:
    shown = numbers.fixed(row.calibration_error, 3)
    return shown if row.changed is None else f"{numbers.fixed(row.calibration_error_before, 3)} → {shown}"


def _flips(row: Any) -> str:
    return "reference" if row.changed is None else tasks.flips(row.figures)


FIRST = {"none": "reference", "least": 0.0}
TASK: Columns = (  # of tasks.rows_of: a table for each task
    figure("model", "name", str),
    figure("accuracy", "accuracy", tasks.accuracy, "accuracy_stderr"),
    figure("difference, points", "accuracy_difference", tasks.difference, "interval", **FIRST),
    Column("flips", _flips, lambda row: (row.flips_to_right or 0) + (row.flips_to_wrong or 0)),
    figure("McNemar p", "mcnemar_p", "{:.2g}".format, none="reference", least=1.0),
    figure("answers changed", "changed", "{:,}".format, none=_alone("changed_by_rounding", str), least=0.0),
    figure("KL at the answers", "kl", numbers.with_error, "kl_stderr", _alone("kl_by_rounding", "{:.5f}".format), 0.0),
    Column("calibration error", _calibration, lambda row: row.calibration_error),
    figure("detectable, points", "minimum_detectable", lambda value: tasks.points(value, sign=False), **FIRST),
)


def known(rows: Sequence[Any], columns: Columns = COLUMNS) -> Columns:
    """The columns in which a row has a figure."""
    return tuple(column for column in columns if any(column.text(row) != NONE for row in rows))


def labels(shown: Columns) -> list[str]:
    """The headings, each different: with the group before it where several groups have a column of that name."""
    headings = [column.heading for column in shown]
    return [f"{each.group}: {each.heading}" if headings.count(each.heading) > 1 else each.heading for each in shown]


def show(rows: Sequence[Any], facts: Sequence[str], shown: Columns | None = None) -> None:
    """Print the table, then the note of each row, then `facts`. shown: the columns, `columns` by default."""
    _print(_console(), rows, facts, shown or columns(rows))


def text(rows: Sequence[Any], facts: Sequence[str], shown: Columns | None = None) -> str:
    """What `show` prints, without colors."""
    out = io.StringIO()
    console = Console(file=out, width=_console().width, force_jupyter=False)  # which would show it, and not write it
    _print(console, rows, facts, shown or columns(rows))
    return out.getvalue().rstrip()


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=240)


def _print(console: Console, rows: Sequence[Any], facts: Sequence[str], shown: Columns) -> None:
    said = lambda words: console.print(f"  {words}", highlight=False, soft_wrap=True, markup=False)
    _table(console, rows, shown)
    for row in filter(lambda row: row.note, rows):
        console.print(Text.assemble("  ", (row.name, "bold"), f": {row.note}"), soft_wrap=True)
    asked = tasks.names(rows)
    for task in asked:
        told = tasks.rows_of(rows, task)
        said(tasks.caption(task, told[0]))
        _table(console, told, TASK)
    for fact in (*facts, *[tasks.READING] * bool(asked)):
        said(fact)


def _table(console: Console, rows: Sequence[Any], shown: Columns) -> None:
    beside = " " if console.width >= 200 else "\n"
    table = Table(header_style="bold", pad_edge=False)
    for index, label in enumerate(labels(shown)):
        table.add_column(label, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(beside.join(filter(None, column.pair(row)))) for column in shown))
    console.print(table)
