"""Runs that were measured before: their results.json (report.journal), read and shown side by side.

Each row is compared with the first row of its own run only: what another machine, commit, text or protocol measured is
no measure of it. `comparable` says which runs differ in none of these.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from efflm.config import InputError, require
from efflm.report import compared, limited, rows, swept, table, tasks
from efflm.report.comparison import EXACT
from efflm.report.page import Section, Table
from efflm.report.plots import Chart
from efflm.report.rows import Row
from efflm.report.table import Columns, figure

FILE = "results.json"
MACHINE = {"cpu": "processor", "cores": "cores", "device": "device", "commit": "commit"}  # named as they are shown
INCREASE, OLD = "bits_per_byte_increase", ("bits_per_byte_over_dense", "over_dense")  # OLD: the names it had


@dataclasses.dataclass(frozen=True)
class Run:
    """What a results.json holds. name: what tells it from the others; more: all beside the rows and these."""

    name: str
    file: Path
    rows: tuple[Row, ...]
    protocol: tuple[str, ...]
    command: str
    versions: Mapping[str, str]
    more: Mapping[str, Any]

    @property
    def machine(self) -> str:
        """In words, with the date and the commit."""
        of = lambda name: self.versions.get(name, "unknown")
        return f"{of('date')} · {of('cpu')}, {of('cores')} cores · commit {of('commit')}"


def read(sources: Sequence[str]) -> list[Run]:
    """Each of these files, or of these run directories. Raises InputError for what is no results.json."""
    files = [Path(each) / FILE if Path(each).is_dir() else Path(each) for each in sources]
    folders = [str(file.parent if file.name == FILE else file.with_suffix("")) for file in files]
    return [_read(name, file) for name, file in zip(rows.names(folders), files)]


def _read(name: str, file: Path) -> Run:
    require(file.is_file(), f"there is no file {file}: give a {FILE}, or a run directory that holds one")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): give a {FILE} that a command of efflm wrote") from None
    kinds = {"protocol": list, "command": str, "versions": dict}
    known = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    known = known and all(isinstance(each, str) for each in (*found["protocol"], *found["versions"].values()))
    require(
        known and _are_rows(found.get("rows", [])),
        f"{file} lacks {', '.join(kinds)} or rows as a {FILE} has them: give one that a command of efflm wrote",
    )
    made = tuple(Row(each.pop("name"), each, each.pop("note", "")) for each in found.pop("rows", []))
    protocol, command, versions = (found.pop(key) for key in kinds)
    return Run(name, file, made, tuple(protocol), command, versions, found)


def _are_rows(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(each, dict) and "name" in each for each in found)


def side_by_side(found: Sequence[Run]) -> tuple[list[Row], Columns]:
    """The rows of models of all runs, with the figure `run`, and the columns in which any has a figure. Raises
    InputError for a run whose rows are of something else, or of an earlier version of efflm."""
    for run in found:
        _require_models(run)
    kinds = [swept.COLUMNS if is_swept(run) else table.columns(run.rows) for run in sorted(found, key=is_swept)]
    columns = {}  # each figure's once: that of the measured rows, where both kinds have one
    for column in itertools.chain(*kinds):
        columns.setdefault(column.figures[0], column)
    names = {name if isinstance(name, str) else name[0] for column in columns.values() for name in column.figures}
    none = dict.fromkeys(names - {"name"})
    made = [Row(row.name, none | row.figures | {"run": run.name}, row.note) for run in found for row in _finite(run)]
    return made, table.known(made, [*columns.values()])


def is_swept(run: Run) -> bool:
    """Whether its rows are those of swept, means over seeds, and not of rows.make."""
    return any("seeds" in row.figures for row in run.rows)


def _require_models(run: Run) -> None:
    figures, again = {name for row in run.rows for name in row.figures}, f"run it again: {run.command}"
    old = not figures.isdisjoint(OLD)
    require(not old, f"{run.file} is of an earlier efflm, whose figures had other names: {again}")
    exact, measured = ("bytes", "parameters"), ("bits_per_byte", "perplexity", INCREASE)
    is_model = lambda row: (
        all(isinstance(row.figures.get(name), int | float) for name in exact)
        and all(isinstance(row.figures.get(name, ""), float | int | None) for name in measured)
    )
    require(
        bool(run.rows) and all(map(is_model, run.rows)),
        f"{run.file} holds no rows of models (it is of: {run.command}): give those of evaluate, compress, quickstart "
        "or sweep",
    )


def _finite(run: Run) -> Iterator[Row]:
    """The rows with the figures that are not finite, for which JSON has no words."""
    for index, row in enumerate(run.rows):
        lost = {"bits_per_byte": math.nan, "perplexity": math.inf} | ({INCREASE: math.nan} if index else {})
        yield row.but(**{name: value for name, value in lost.items() if getattr(row, name) is None})


def quality_protocol(run: Run) -> str:
    """What was scored and how, which is one sentence (scoring.protocol), without those about differences after it."""
    words = next((each for each in run.protocol if each.startswith("Quality: ")), "Quality: unknown.")
    return re.split(r"\. (?=[A-Z])", words)[0].rstrip(".")


def _conditions(run: Run) -> dict[str, Any]:
    """What must be the same for losses to be compared, named as it is shown. The same loss of the first models tells
    that the model and the text are the same."""
    first, machine = run.rows[0], {shown: run.versions.get(name) for name, shown in MACHINE.items()}
    model = (first.parameters, round((first.bits_per_byte or 0.0) / EXACT))
    return machine | {"what was scored": quality_protocol(run), "first model or text": model}


def comparable(found: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups whose losses can be compared. Their speeds cannot: they are not of the same rounds."""
    groups: dict[Any, list[Run]] = {}
    for run in found:
        groups.setdefault(tuple(_conditions(run).values()), []).append(run)
    return list(groups.values())


def facts(found: Sequence[Run]) -> list[str]:
    """What is compared with what, in what the runs differ, and the protocol of each."""
    own = "Each row is compared with the first row of its own run, never with a row of another run"
    said = [f"{own}: {_apart(found)}." if len(found) > 1 else f"{own}."]
    for run in found:
        said += [f"{run.name}: {run.machine}.", *(f"{run.name}: {each}" for each in run.protocol)]
    return said


def _apart(found: Sequence[Run]) -> str:
    """What the runs differ in, in words."""
    every = [_conditions(run) for run in found]
    differ = [shown for shown in every[0] if len({each[shown] for each in every}) > 1]
    rounds = "their speeds are of different rounds"
    return f"the runs differ in {', '.join(differ)}, and {rounds}" if differ else rounds


def sections(found: Sequence[Run], made: Sequence[Row], columns: Columns) -> list[Section]:
    """Of the page. made, columns: as `side_by_side` gives them."""
    caption = "Each row beside the first of its own run; × is the ratio to it."
    whole = Table(caption=caption, columns=columns, rows=made, headings={run.name: run.machine for run in found})
    drawn = [_plot(group, made) for group in comparable(found)]
    words = "A plot has the rows of runs of the same machine, commit, protocol, text and first model."
    about = [
        Row(run.name, {**run.versions, "quality": quality_protocol(run).removeprefix("Quality: ")}, run.command)
        for run in found
    ]
    shown = {"date": "date"} | MACHINE | {"quality": "what was scored"}
    columns = [figure("run", "name", str), *(figure(shown[name], name, str) for name in shown)]
    grids = {run.name: run.more.get("domains") for run in found}
    texts = [limited.domains(grid, f"{name}: ") for name, grid in grids.items() if grid]
    asked = [
        dataclasses.replace(each, caption=f"{run.name}: {each.caption}")
        for run in found
        for each in (compared.of_task(run.rows, task) for task in tasks.names(run.rows))
    ]
    return [
        Section("The rows", [whole]),
        *[Section("Tasks", asked, tasks.READING)] * bool(asked),
        *[Section("Text that chains are made from and test text", texts)] * bool(texts),
        Section("Loss against bytes", drawn, words),
        Section("The runs", [Table(caption="How each was measured.", columns=columns, rows=about)]),
    ]


def _plot(group: Sequence[Run], made: Sequence[Row]) -> Chart:
    chart, names = compared.against_bytes(list(_losses(group, made))), ", ".join(run.name for run in group)
    return dataclasses.replace(chart, alt=f"{names}: {chart.alt}", caption=f"{names}: {chart.caption}")


def _losses(group: Sequence[Run], made: Sequence[Row]) -> Iterator[Row]:
    """The rows of these runs with one row of the first model, which is the same in all."""
    for index, run in enumerate(group):
        mine = [row for row in made if row.run == run.name]
        yield from mine[1:] if index else mine
