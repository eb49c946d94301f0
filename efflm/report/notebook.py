"""Tables in a notebook, as the HTML that it shows of an object (_repr_html_): what report.table prints."""

import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from efflm.report import table, tasks
from efflm.report.table import Columns


def shown(rows: Sequence[Any], facts: Sequence[str]) -> str:
    """The table with the columns in which a row has a figure, the note of each row, a table for each task, `facts`."""
    notes = [f"<li><b>{html.escape(row.name)}</b>: {html.escape(row.note)}</li>" for row in rows if row.note]
    asked = tasks.names(rows)
    of_tasks = [(task, tasks.rows_of(rows, task)) for task in asked]
    more = [_table(told, table.TASK, tasks.caption(task, told[0])) for task, told in of_tasks]
    said = [f"<li>{html.escape(fact)}</li>" for fact in (*facts, *[tasks.READING] * bool(asked))]
    whole = _table(rows, table.known(rows, table.columns(rows)))
    return "".join([whole, _listed(notes), *more, _listed(said)])


def _listed(items: Sequence[str]) -> str:
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _table(rows: Sequence[Any], columns: Columns, caption: str = "") -> str:
    """Errors and ranges stand below their figures."""
    groups = [(name, len(list(each))) for name, each in itertools.groupby(columns, lambda column: column.group)]
    above = "".join(f'<th colspan="{count}" scope="colgroup">{html.escape(name)}</th>' for name, count in groups)
    heads = "".join(f'<th scope="col">{html.escape(column.heading)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(_cells(row, columns))}</tr>" for row in rows)
    grouped = f"<tr>{above}</tr>" if len(groups) > 1 else ""
    named = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{named}<thead>{grouped}<tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Any, columns: Columns) -> Iterator[str]:
    for index, column in enumerate(columns):
        text, beside = map(html.escape, column.pair(row))
        small = f"<br><small>{beside}</small>" if beside else ""
        yield f"<td>{text}{small}</td>" if index else f'<th scope="row">{text}</th>'
