"""Published tables: what stands between two marks of a .md file is made of a results.json that is committed.

    <!-- results: experiments/results/quickstart.json; rows=w8a8 | gptq4; columns=MB on disk | MB on disk × -->
    <!-- end -->

`experiments.report --publish` writes there the machine, commit, date, seeds and command, then the table and the
protocol. The file is what report.journal.Journal.results writes, of one machine and one commit. rows, columns: which
of them, by name and by heading; default: all. `w8a16 as half the memory` has a row under another name, and so have
columns. A heading with × after it is the ratio to the first row. task=NAME: what the rows say of that task alone.
protocol=none leaves the protocol out, command=none the command.

Rows of models have the columns of report.table or, means over seeds, of report.swept; those of tasks are called `TASK:
HEADING`. Of other rows each figure is a column, with its error or range beside it: `loss_stderr`, `_error`,
`_deviation`, `_sd` or `_spread` of `loss`. The file may say which figures, and what they are called: `"columns":
{"name": "recipe", "loss": "test loss"}`. A figure has no more digits than its error allows and than the file has;
without an error it has at most four.

A file with the field `transcribed` was copied from prose, which that names; what that left out is "not recorded".
"""

import dataclasses
import decimal
import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from efflm.cli import run_directory
from efflm.config import require
from efflm.report import numbers, runs, swept, table, tasks
from efflm.report.rows import Row
from efflm.report.runs import Run
from efflm.report.table import NONE, Column

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "results"
BEGIN, END = "<!-- results:", "<!-- end -->"
MARKED = re.compile(rf"^{BEGIN} (.*?) -->\n.*?^{END}$", re.M | re.S)
UNKNOWN = "not recorded"
KEPT = ("verdicts", "protocol", "command", "versions", "seed", "seeds", "noise")
BULK = ("component_bytes",)  # a figure that no table shows
ERRORS = ("_stderr", "_error", "_deviation", "_sd")
BESIDE = (*ERRORS, "_spread")
MODEL = {"parameters", "bytes", "bits_per_byte", "bits_per_byte_increase"}  # figures of rows.make and of swept.row
MEGABYTES = {"bytes": "MB", "peak_bytes": "peak MB", "resident_bytes": "MB in memory"}
SHARES, TIMES, SIGNED = ("_share", "_agreement"), ("_speedup", "ratio"), ("_increase", "_difference")


def fill(text: str, root: Path = ROOT) -> str:
    """The text of a .md file with its tables made anew. root: what the files that it names are relative to."""
    begun, whole = len(re.findall(f"^{BEGIN}", text, re.M)), len(MARKED.findall(text))
    require(begun == whole, f"{begun} tables begin with a line {BEGIN} NAME.json -->, but {whole} end with {END}")
    return MARKED.sub(lambda found: f"{BEGIN} {found[1]} -->\n{_between(found[1], root)}{END}", text)


def fill_all(root: Path = ROOT) -> list[Path]:
    """Make the tables of all .md files anew. Gives the files that changed."""
    changed = []
    for path in marked_files(root):
        old = path.read_text(encoding="utf-8")
        if (new := fill(old, root)) != old:
            run_directory.write_whole(path, new)
            changed.append(path)
    return changed


def marked_files(root: Path = ROOT) -> list[Path]:
    """The .md files that have tables."""
    below = (path for top in ("efflm", "experiments", "launch") for path in (root / top).rglob("*.md"))
    marked = lambda path: re.search(f"^{BEGIN}", path.read_text(encoding="utf-8"), re.M)
    return sorted(filter(marked, [*root.glob("*.md"), *below]))


def keep(source: str, folder: Path = FOLDER) -> Path:
    """Keep what tables need of a run's results.json in the folder, under the name of the run directory."""
    run = read(source)
    found = json.loads(run.file.read_bytes())
    kept = {"rows": [{key: value for key, value in row.items() if key not in BULK} for row in found["rows"]]}
    run_directory.write_json(folder / f"{run.name}.json", kept | {key: found[key] for key in KEPT if key in found})
    return folder / f"{run.name}.json"


def read(source: str) -> Run:
    """A results.json, or that of a run directory, of one machine and one commit. Raises InputError for any other."""
    (run,) = runs.read([source])
    missing = [name for name in ("date", "commit", "cpu", "cores") if not run.versions.get(name)]
    missing += [name for name in ("rows", "command") if not getattr(run, name)]
    require(not missing, f"{run.file} has no {', '.join(missing)}: it is not what an experiment writes")
    commit = run.versions["commit"]
    known = re.fullmatch("[0-9a-f]{7,40}", commit) or ("transcribed" in run.more and commit == UNKNOWN)
    require(bool(known), f"{run.file} is of commit {commit!r}, not of one that others have: commit, and measure again")
    return run


def origin(run: Run, command: bool = True) -> str:
    """Where the figures are from, in a line."""
    cores = "" if run.versions["cores"] == UNKNOWN else f", {run.versions['cores']} cores"
    told = {"machine": run.versions["cpu"] + cores, "commit": run.versions["commit"], "date": run.versions["date"]}
    told |= {name: run.more[name] for name in ("seed", "seeds") if name in run.more}
    if command:
        told["command"] = UNKNOWN if run.command == UNKNOWN else f"`{run.command}`"
    missing = ", ".join(name for name, value in told.items() if value == UNKNOWN)
    words = [f"{name}: {value}" for name, value in told.items() if value != UNKNOWN]
    words += [f"{missing}: {UNKNOWN}"] * bool(missing) + ["transcribed"] * ("transcribed" in run.more)
    line = "; ".join(words)
    return f"{line[0].upper()}{line[1:]}."


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table with the names on the left; a name that is one word is set as code."""
    shown = [[" ".join(filter(None, column.pair(row))) for column in columns] for row in rows]
    named = [[name if re.search(r"[\s`]", name) else f"`{name}`", *figures] for name, *figures in shown]
    cells = [table.labels(columns), *named]
    head, *body = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in cells]
    return "".join([head, "|---|" + "---:|" * (len(columns) - 1) + "\n", *body])


def columns_of(run: Run) -> tuple[Sequence[Row], Sequence[Column]]:
    """The rows, with None for what was not measured when they were written, and the columns in which one has a figure:
    those of models, where the file has no headings and each row is one; otherwise one for each figure."""
    single = (name for row in run.rows for name, value in row.figures.items() if not isinstance(value, dict | list))
    there = dict.fromkeys(("name", *single))
    if "columns" not in run.more and all(row.figures.keys() >= MODEL for row in run.rows):
        known = swept.COLUMNS if runs.is_swept(run) else table.columns(run.rows)
        columns = [column for column in known if column.figures[0] in there or not isinstance(column.figures[0], str)]
    else:
        alone = (name for name in there if not _is_beside(name, there))
        headings = {name: MEGABYTES.get(name, name.replace("_", " ")) for name in alone}
        headings = run.more.get("columns", headings)
        columns = [_figure(name, heading) for name, heading in headings.items()]
    names = (name for column in columns for name in column.figures if isinstance(name, str) and name != "name")
    none = dict.fromkeys(names)
    rows = [Row(row.name, none | row.figures) for row in run.rows]
    return rows, table.known(rows, columns)


def _of_task(task: str, column: Column) -> Column:
    """A column of the table of a task, for rows of models."""
    told = lambda row: row.at(("tasks", task))
    text = lambda row: column.text(Row(row.name, told(row))) if told(row) else NONE
    return Column(f"{task}: {column.heading}", text)


def _is_beside(name: str, others: Container[str]) -> bool:
    """Whether it is the error or the range of another figure."""
    return any(name.endswith(end) and name.removesuffix(end) in others for end in BESIDE)


def _figure(name: str, heading: str) -> Column:
    """The column of one figure, or of the names."""

    def text(row: Row) -> str | tuple[str, str]:
        value, spread = getattr(row, name), row.figures.get(f"{name}_spread")
        if value is None or isinstance(value, str):
            return value or NONE
        if spread:
            return numbers.with_range(value, spread)
        if name in MEGABYTES:
            return numbers.megabytes(value)
        errors = [row.figures.get(name + end) for end in ERRORS]
        return _written(name, value, next(filter(None, errors), None))

    return Column(heading, text, lambda row: getattr(row, name), figures=(name,))


def _written(name: str, value: float, error: float | None) -> tuple[str, str]:
    """A figure and its error, by what its name ends with."""
    share, sign = name.endswith(SHARES), name.endswith(SIGNED)
    places = max(map(_places, filter(None, (value, error))), default=0)
    unit = "%" if share else "×" if name.endswith(TIMES) else ""
    if share:
        value, error, places = 100 * value, error and 100 * error, max(0, places - 2)
    if error:
        shown, beside = numbers.with_error(value, error, sign=sign, most=min(places, numbers.MOST_DECIMALS))
        return shown + unit, beside + "%" * share
    largest = math.floor(math.log10(abs(value))) if value else 0
    return numbers.fixed(value, min(places, max(0, 3 - largest)), sign) + unit, ""


def _places(value: float) -> int:
    """Digits after the point that a number of a file has."""
    return max(0, -decimal.Decimal(repr(value)).as_tuple().exponent)


def _ratio(column: Column, first: Row) -> Column:
    """The ratio to the first row: where it was measured as such, that with its error."""

    def text(row: Row) -> str | tuple[str, str]:
        if column.ratio:
            return numbers.times(*column.ratio(row)) if column.ratio(row) != (1.0, 0.0) else "1×"  # the first row
        value, base = column.value(row), column.value(first)
        return numbers.ratio(value / base) if value is not None and base else NONE

    return Column(f"{column.heading} ×", text)


def _chosen(kind: str, there: Mapping[str, Any], names: str, file: str) -> dict[str, Any]:
    """Those of the names, in their order, by what they are to be called."""
    wanted = [[part.strip() for part in name.partition(" as ")[::2]] for name in names.split("|")]
    for name, _ in wanted:
        require(name in there, f"{file} has no {kind} {name!r}, only {' | '.join(there)}")
    return {called or name: there[name] for name, called in wanted}


def _between(what: str, root: Path) -> str:
    """What stands between the marks. what: the file, and the choices after it."""
    file, *choices = (part.strip() for part in what.split(";"))
    chosen = dict(choice.partition("=")[::2] for choice in choices)
    unknown = ", ".join(sorted(chosen.keys() - {"rows", "columns", "task", "protocol", "command"}))
    require(
        not unknown, f"{file}: {unknown} is no choice, only rows=, columns=, task=, protocol=none and command=none are"
    )
    run = read(str(root / file))
    protocol = [] if chosen.get("protocol") == "none" else list(run.protocol)
    if task := chosen.get("task"):
        known = ", ".join(tasks.names(run.rows))
        require(task in tasks.names(run.rows), f"{file} has no task {task!r}, only {known}")
        rows, (name, *columns) = tasks.rows_of(run.rows, task), table.TASK
        protocol.insert(0, tasks.caption(task, rows[0]))
    else:
        rows, (name, *columns) = columns_of(run)
    there = {each.heading: each for column in columns for each in (column, _ratio(column, rows[0]))}
    of_tasks = [_of_task(each, column) for each in tasks.names(rows) for column in table.TASK[1:]]
    there |= {column.heading: column for column in of_tasks}
    if "columns" in chosen:
        wanted = _chosen("column", there, chosen["columns"], file)
        columns = [dataclasses.replace(column, heading=called) for called, column in wanted.items()]
    if "rows" in chosen:
        wanted = _chosen("row", {row.name: row for row in rows}, chosen["rows"], file)
        rows = [dataclasses.replace(row, name=called) for called, row in wanted.items()]
    below = f"\nProtocol: {' '.join(protocol)}\n" if protocol else ""
    return f"{origin(run, chosen.get('command') != 'none')}\n\n{markdown(rows, [name, *columns])}{below}"
