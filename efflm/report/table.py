"""Tables: what their columns show, and how they look in the terminal. The page (report.page) shows the same ones."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from efflm.report import comparison, numbers


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table whose rows are any dataclasses with a name and a note.

    text: a row's figure, or the figure and what stands beside it: its error, range or unit. value: what to sort by;
    None: the text. group: what the column belongs to, named above it. best: which way it is better; such figures are
    also shown as ratios to those of the first row. ratio: gives that ratio and its error where it was measured as such:
    then rows are sorted by it.
    """

    heading: str
    text: Callable[[Any], str | tuple[str, str]]
    value: Callable[[Any], float | None] | None = None
    group: str = ""
    best: Literal["", "smallest", "largest"] = ""
    ratio: Callable[[Any], tuple[float, float | None]] | None = None

    def pair(self, row: Any) -> tuple[str, str]:
        shown = self.text(row)
        return (shown, "") if isinstance(shown, str) else shown


Columns = Sequence[Column]


def _against_first(value: float | None, error: float | None, **how: Any) -> tuple[str, str]:
    return ("reference", "") if value is None else numbers.with_error(value, error, **how)


def _parameters(row: Any) -> tuple[str, str]:
    millions = lambda count: f"{numbers.fixed(count / 1e6, 2)} M"
    zeros = row.nonzeros < 0.99 * row.parameters
    return millions(row.parameters), f"{millions(row.nonzeros)} non-zero" if zeros else ""


# The rows are rows.Row
COLUMNS: Columns = (
    Column("model", lambda row: row.name),
    Column("parameters", _parameters, lambda row: row.parameters, "size"),
    Column("MB on disk", lambda row: numbers.megabytes(row.bytes), lambda row: row.bytes, "size", "smallest"),
    Column("matmuls in", lambda row: row.precision, None, "speed"),
    Column(
        "prefill tok/s",
        lambda row: numbers.with_range(row.prefill_tokens_per_second, row.prefill_spread),
        lambda row: row.prefill_tokens_per_second,
        "speed",
        "largest",
        lambda row: comparison.times(row, "prefill"),
    ),
    Column(
        "decode tok/s",
        lambda row: numbers.with_range(row.decode_tokens_per_second, row.decode_spread),
        lambda row: row.decode_tokens_per_second,
        "speed",
        "largest",
        lambda row: comparison.times(row, "decode"),
    ),
    Column(
        "bits/byte",
        lambda row: numbers.with_error(row.bits_per_byte, row.bits_per_byte_stderr),
        lambda row: row.bits_per_byte,
        "quality, ± standard error",
    ),
    Column(
        "over dense",
        lambda row: _against_first(row.bits_per_byte_over_dense, row.bits_per_byte_over_dense_stderr, sign=True),
        lambda row: row.bits_per_byte_over_dense or 0.0,
        "quality, ± standard error",
    ),
    Column(
        "perplexity",
        lambda row: numbers.perplexity(row.perplexity, row.perplexity_stderr),
        lambda row: row.perplexity,
        "quality, ± standard error",
    ),
    Column(
        "KL to dense",
        lambda row: _against_first(row.kl_to_dense, row.kl_to_dense_stderr),
        lambda row: row.kl_to_dense or 0.0,
        "quality, ± standard error",
    ),
    Column(
        "same top-1",
        lambda row: (
            ("reference", "")
            if row.top1_agreement is None
            else numbers.percent(row.top1_agreement, row.top1_agreement_stderr)
        ),
        lambda row: 1.0 if row.top1_agreement is None else row.top1_agreement,
        "quality, ± standard error",
    ),
)


def measured(rows: Sequence[Any]) -> Columns:
    """COLUMNS, without the speed where it was not measured."""
    timed = all(row.prefill_tokens_per_second is not None for row in rows)
    return tuple(column for column in COLUMNS if timed or not column.heading.endswith("tok/s"))


def show(rows: Sequence[Any], facts: Sequence[str], columns: Columns = COLUMNS) -> None:
    """Print the table, then the note of each row, then `facts`."""
    _print(_console(), rows, facts, columns)


def text(rows: Sequence[Any], facts: Sequence[str], columns: Columns = COLUMNS) -> str:
    """What `show` prints, without colors."""
    out = io.StringIO()
    _print(Console(file=out, width=_console().width), rows, facts, columns)
    return out.getvalue().rstrip()


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=240)


def _print(console: Console, rows: Sequence[Any], facts: Sequence[str], columns: Columns) -> None:
    beside = " " if console.width >= 200 else "\n"
    table = Table(header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column.heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(beside.join(filter(None, column.pair(row))) for column in columns))
    console.print(table)
    for row in filter(lambda row: row.note, rows):
        console.print(Text.assemble("  ", (row.name, "bold"), f": {row.note}"), soft_wrap=True)
    for fact in facts:
        console.print(f"  {fact}", highlight=False, soft_wrap=True, markup=False)
