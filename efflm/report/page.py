"""The report: one HTML page that stands by itself. Style and script are in it, nothing is requested from elsewhere."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efflm.cli.run_directory import PACKAGES, to_json, write_whole
from efflm.report import numbers, table
from efflm.report.plots import Chart
from efflm.report.samples import Sample
from efflm.report.table import Column, Columns
from efflm.report.verdicts import Verdict

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detail:
    """What a row opens to. lineage: the steps by which the model was made, by name and in words; samples: {model: what
    it writes}, the first row's first; command: makes just this row."""

    lineage: Sequence[tuple[str, str]] = ()
    samples: dict[str, Sample] = dataclasses.field(default_factory=dict)
    agreement: str = ""
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure: what is shown, beside it its error or range, its ratio to the first row's with the share of the
    column's largest in percent, what is sorted by, and the figures at full precision, as JSON."""

    text: str
    beside: str
    ratio: str
    part: str
    sort: str
    figures: str = "[]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, which have a name and a note, under columns. details: {name of a row: what it opens to beside its note}.

    Rows of several runs have the figure `run`: each is compared with the first of its run. headings: {run: what is said
    of it above its rows}.
    """

    caption: str
    columns: Columns
    rows: Sequence[Any]
    details: dict[str, Detail] = dataclasses.field(default_factory=dict)
    headings: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[str, list[Any]]]:
        """(run, its rows), top to bottom."""
        return [(run, list(rows)) for run, rows in itertools.groupby(self.rows, _run)]

    @property
    def groups(self) -> list[tuple[str, list[tuple[int, Column]]]]:
        """(name, its columns with their places), left to right."""
        groups = itertools.groupby(enumerate(self.columns), lambda each: each[1].group)
        return [(name, list(columns)) for name, columns in groups]

    @property
    def labels(self) -> list[str]:
        return table.labels(self.columns)

    def names(self, column: Column) -> str:
        """Of the figures of its cells, as JSON."""
        return to_json([*column.data(self.rows[0])] if self.rows else [])

    def detail(self, row: Any) -> Detail | None:
        return self.details.get(row.name, Detail() if row.note else None)

    def cell(self, column: Column, row: Any) -> Cell:
        text, beside = column.pair(row)
        figures = to_json([*column.data(row).values()], separators=(",", ":"))
        value = column.value(row) if column.value else None
        sort = text if column.value is None else _key(value)
        rows = next(rows for run, rows in self.runs if run == _run(row))
        first = column.value(rows[0]) if column.best and column.value else None
        if not first or value is None or len(rows) < 2:
            return Cell(text, beside, "", "", sort, figures)
        ratio, error, largest = value / first, 0.0, max(column.value(each) or 0.0 for each in rows) / first
        if column.ratio:
            (ratio, error), largest = column.ratio(row), max(column.ratio(each)[0] for each in rows)
            sort = _key(ratio)
        shown = "1×" if row is rows[0] else numbers.ratio(ratio, (error or 0.0) / ratio)
        return Cell(text, beside, shown, f"{100 * ratio / largest:.1f}", sort, figures)


def _run(row: Any) -> str:
    """The run that a row is of, "" where a table has the rows of one."""
    return row.figures.get("run", "")


def _key(value: float | None) -> str:
    """What the page's script sorts by, a number as it reads one; what has no figure comes last."""
    if value is None or math.isnan(value):
        return ""
    return repr(float(value)).replace("inf", "Infinity")


@dataclasses.dataclass(frozen=True)
class Bar:
    """pieces: how much of the track's width each takes, in percent, and what pointing at it shows."""

    name: str
    total: str
    pieces: Sequence[tuple[float, str]]


@dataclasses.dataclass(frozen=True)
class Bars:
    """A bar a name, made of parts in the same order and colors."""

    caption: str
    parts: Sequence[str]
    bars: Sequence[Bar]


def bars(caption: str, values: dict[str, dict[str, float]], unit: str, scale: float, each_whole: bool = False) -> Bars:
    """values: {name: {part: value}}, shown as value / scale in `unit`; each_whole: every bar is as long as the others,
    where the totals are no measure of each other. A value that is not finite has no length."""
    finite = lambda value: value if math.isfinite(value) else 0.0
    values = {name: {part: finite(value) for part, value in found.items()} for name, found in values.items()}
    parts = list(dict.fromkeys(part for found in values.values() for part in found))
    totals = {name: sum(found.values()) for name, found in values.items()}
    longest, out = max(totals.values()), []
    for name, found in values.items():
        total = totals[name]
        whole = (total if each_whole else longest) or 1.0
        pieces = []
        for part in parts:
            value = found.get(part, 0.0)
            tip = f"{name}, {part}: {numbers.three_digits(value / scale)} {unit} ({value / (total or 1.0):.0%})"
            pieces.append((round(100 * value / whole, 3), tip))
        out.append(Bar(name, f"{numbers.three_digits(total / scale)} {unit}", pieces))
    return Bars(caption, parts, out)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under its own heading."""

    heading: str
    blocks: Sequence[Table | Chart | Bars]
    words: str = ""


def write(
    path: Path,
    *,
    title: str,
    sections: Sequence[Section],
    facts: Sequence[str],
    made: dict[str, str],
    command: str,
    about: str = "",
    verdicts: Sequence[Verdict] = (),
    against: Sequence[Verdict] = (),
) -> None:
    """Write the page. verdicts: what the figures say, first; against: what is not worth it. facts: how they were
    measured. made: {date, commit, ...} and the command that makes the page again."""
    import jinja2  # here, for its only use: --help must not wait for it

    how = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), **how)
    numbered = (dataclasses.replace(each, blocks=_unique(each.blocks, f"s{i}")) for i, each in enumerate(sections))
    write_whole(
        path,
        environment.get_template("page.html").render(
            title=title, about=about, verdicts=verdicts, against=against, sections=list(numbered), facts=facts,
            made=made, command=command, kind=lambda block: type(block).__name__, absent=table.NONE,
            style=(HERE / "page.css").read_text(), script=(HERE / "page.js").read_text(),
        ),
    )  # fmt: skip


def made(machine: dict[str, str], **more: Any) -> dict[str, str]:
    """What stands under "how it was made". machine: run_directory.machine(); more: a run's seed, steps, time."""
    named = {"cpu": "processor"}
    found = {named.get(name, name): value for name, value in machine.items() if name not in PACKAGES}
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES)
    return found | {name.replace("_", " "): str(value) for name, value in more.items()} | {"packages": versions}


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _unique(blocks: Sequence[Any], prefix: str) -> list[Any]:
    """The blocks with ids that no other plot on the page has."""
    return [
        dataclasses.replace(block, svg=re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-{index}-", block.svg))
        if isinstance(block, Chart)
        else block
        for index, block in enumerate(blocks)
    ]
