"""The table in the terminal."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def rate(median: float, bounds: tuple[float, float]) -> str:
    """The median and (the quartiles)."""
    short = lambda value: f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:,.0f}"
    return f"{short(median)} ({short(bounds[0])}–{short(bounds[1])})"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def with_error(value: float, error: float | None, form: str = ".4f") -> str:
    """A figure and its standard error, in one format; of a single document there is none."""
    sizes = form.lstrip("+")
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{sizes}}"


def perplexity(value: float, error: float | None) -> str:
    """With as many decimals as make sense: a ruined model's perplexity is in the hundreds."""
    return with_error(value, error, ",.3f" if value < 100 else ",.1f")


# (heading, one row's entry)
Columns = tuple[tuple[str, Callable[[Any], str]], ...]

# The terminal and the page show the same columns
COLUMNS: Columns = (
    ("model", lambda row: row.name),
    ("matmuls in", lambda row: row.precision),
    ("parameters", lambda row: f"{row.parameters / 1e6:.2f} M"),
    ("non-zero", lambda row: f"{row.nonzeros / 1e6:.2f} M"),
    ("MB on disk", lambda row: megabytes(row.bytes)),
    ("prefill tok/s", lambda row: rate(row.prefill_tokens_per_second, row.prefill_spread)),
    ("decode tok/s", lambda row: rate(row.decode_tokens_per_second, row.decode_spread)),
    ("bits/byte ± s.e.", lambda row: with_error(row.bits_per_byte, row.bits_per_byte_stderr)),
    (
        "over dense ± s.e.",
        lambda row: with_error(row.bits_per_byte_over_dense, row.bits_per_byte_over_dense_stderr, "+.4f"),
    ),
    ("perplexity ± s.e.", lambda row: perplexity(row.perplexity, row.perplexity_stderr)),
    ("KL to dense ± s.e.", lambda row: with_error(row.kl_to_dense, row.kl_to_dense_stderr)),
    ("same top-1 ± s.e.", lambda row: with_error(row.top1_agreement, row.top1_agreement_stderr, ".1%")),
)


SPEED = ("prefill tok/s", "decode tok/s")


def measured(rows: Sequence[Any]) -> Columns:
    """COLUMNS, without the speed where it was not measured."""
    timed = all(row.prefill_tokens_per_second is not None for row in rows)
    return tuple(column for column in COLUMNS if timed or column[0] not in SPEED)


def show(rows: Sequence[Any], facts: Sequence[str], columns: Columns = COLUMNS) -> None:
    """Print the table, then the note of each row, then `facts`. The rows of other columns need a name and a note."""
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
    table = Table(header_style="bold", pad_edge=False)
    for index, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(entry(row) for _, entry in columns))
    console.print(table)
    for row in filter(lambda row: row.note, rows):
        console.print(f"  [bold]{row.name}[/bold]: {row.note}", highlight=False, soft_wrap=True)
    for fact in facts:
        console.print(f"  {fact}", highlight=False, soft_wrap=True, markup=False)
