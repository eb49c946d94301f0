"""Published tables: what stands between two marks of a .md file is made of a results.json that is committed.

    <!-- results: experiments/results/quickstart.json; rows=w8a8 | gptq4; columns=MB on disk | MB on disk × -->
    <!-- end -->

`fill` writes there the machine, commit, date, seeds and command, then the table and the protocol. The file is what
report.journal.Journal.results writes, of one machine and one commit. rows, columns: which of them, by name and by
heading; default: all. A heading with × after it is the ratio to the first row. protocol=none leaves the protocol out.

Rows of models (report.rows.make) have the columns of report.table. Of other rows each figure is a column, with its
error or range beside it: `loss_stderr`, `loss_deviation`, `loss_sd` or `loss_spread` of `loss`. The file may say which
figures, and what they are called: `"columns": {"name": "recipe", "loss": "test loss"}`. A figure has no more digits
than its error allows and than the file has; without an error it has at most four.

A file with the field `transcribed` was copied from prose, which that names; what the prose left out is "not recorded".
"""

import decimal
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efflm.cli import run_directory
from efflm.config import InputError, require
from efflm.report import numbers, table
from efflm.report.rows import Row
from efflm.report.table import NONE, Column

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "results"
BEGIN, END = "<!-- results:", "<!-- end -->"
MARKED = re.compile(rf"^{BEGIN} (.*?) -->\n.*?^{END}$", re.M | re.S)
UNKNOWN = "not recorded"
KEPT = ("rows", "protocol", "command", "versions", "seed", "seeds")
BULK = ("component_bytes",)  # no table shows it
ERRORS = ("_stderr", "_deviation", "_sd")
BESIDE = (*ERRORS, "_spread")
MODEL = {"precision", "bits_per_byte", "kl_to_original"}  # figures of rows.make
SHARES, TIMES, SIGNED = ("_share", "_agreement"), ("_speedup", "_ratio"), ("_increase", "_difference")


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
    """The .md files that have tables; hidden folders are left out."""
    there = [*sorted(root.glob("*.md")), *sorted(root.glob("[a-z]*/**/*.md"))]
    return [path for path in there if re.search(f"^{BEGIN}", path.read_text(encoding="utf-8"), re.M)]


def keep(run_dir: Path, name: str, folder: Path = FOLDER) -> Path:
    """Keep what tables need of a run's results.json as the file name.json of the folder."""
    found = read(run_dir / "results.json")
    rows = [{figure: value for figure, value in row.items() if figure not in BULK} for row in found["rows"]]
    run_directory.write_json(
        folder / f"{name}.json", {key: found[key] for key in KEPT if key in found} | {"rows": rows}
    )
    return folder / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A results.json, of one machine and one commit. Raises InputError for any other."""
    require(path.is_file(), f"there is no {path}: run the command that writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): run the command that writes it again") from None
    missing = [name for name in ("rows", "protocol", "command", "versions") if not found.get(name)]
    missing += [name for name in ("date", "commit", "cpu", "cores") if not found.get("versions", {}).get(name)]
    require(not missing, f"{path} has no {', '.join(missing)}: it is not what an experiment writes")
    commit = found["versions"]["commit"]
    known = re.fullmatch("[0-9a-f]{7,40}", commit) or ("transcribed" in found and commit == UNKNOWN)
    require(bool(known), f"{path} is of commit {commit!r}, not of one that others have: commit, and measure again")
    return found


def origin(found: Mapping[str, Any]) -> str:
    """Where the figures are from, in a line."""
    versions, command = found["versions"], found["command"]
    cores = "" if versions["cores"] == UNKNOWN else f", {versions['cores']} cores"
    told = {"machine": versions["cpu"] + cores, "commit": versions["commit"], "date": versions["date"]}
    told |= {name: found[name] for name in ("seed", "seeds") if name in found}
    told["command"] = UNKNOWN if command == UNKNOWN else f"`{command}`"
    words = "; ".join(f"{name}: {value}" for name, value in told.items() if value != UNKNOWN)
    missing = ", ".join(name for name, value in told.items() if value == UNKNOWN)
    copied = f"transcribed {found['transcribed']}" if "transcribed" in found else ""
    words = "; ".join(filter(None, [words, missing and f"{missing}: {UNKNOWN}", copied]))
    return f"{words[0].upper()}{words[1:]}."


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table with the names on the left; a name that is one word is set as code."""
    lines = [[_shown(column, row) for column in columns] for row in rows]
    named = [[name if re.search(r"[\s`]", name) else f"`{name}`", *figures] for name, *figures in lines]
    cells = [[column.heading for column in columns], *named]
    head, *body = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in cells]
    return "".join([head, "|---|" + "---:|" * (len(columns) - 1) + "\n", *body])


def columns_of(found: Mapping[str, Any], rows: Sequence[Row]) -> list[Column]:
    """Those of models where each row has their figures and the file has no headings; otherwise one for each figure."""
    if "columns" not in found and all(row.figures.keys() >= MODEL for row in rows):
        return [column for column in table.COLUMNS if any(_shown(column, row) != NONE for row in rows)]
    figures = dict.fromkeys(name for row in rows for name in row.figures if _is_figure(name, row.figures))
    headings = {name: name.replace("_", " ") for name in ("name", *figures)}
    return [_figure(name, heading) for name, heading in found.get("columns", headings).items()]


def _is_figure(name: str, figures: Mapping[str, Any]) -> bool:
    """Whether it is a number or a word, and not said beside another figure."""
    beside = any(name.endswith(end) and name.removesuffix(end) in figures for end in BESIDE)
    return name not in ("name", "note") and not beside and isinstance(figures[name], int | float | str)


def _shown(column: Column, row: Row) -> str:
    """What a column shows of a row, also of one that was written before the column's figure was measured."""
    try:
        return " ".join(filter(None, column.pair(row)))
    except AttributeError:  # see Row.__getattr__
        return NONE


def _figure(name: str, heading: str) -> Column:
    """The column of one figure."""

    def text(row: Row) -> str | tuple[str, str]:
        value = row.figures.get(name)
        beside = {end: row.figures.get(name + end) for end in BESIDE}
        error = next((beside[end] for end in ERRORS if beside[end] is not None), None)
        if value is None or isinstance(value, str):
            return value or NONE
        if beside["_spread"]:
            return numbers.with_range(value, beside["_spread"])
        if name == "bytes":
            return numbers.megabytes(value)
        return _written(name, value, error)

    return Column(heading, text, lambda row: row.figures.get(name))


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
            return numbers.times(*column.ratio(row))
        value, base = column.value(row), column.value(first)
        return numbers.ratio(value / base) if value is not None and base else NONE

    return Column(f"{column.heading} ×", text)


def _chosen(kind: str, there: Mapping[str, Any], names: str, file: str) -> list[Any]:
    """Those of the names, in their order."""
    wanted = [name.strip() for name in names.split("|")]
    for name in wanted:
        require(name in there, f"{file} has no {kind} {name!r}, only {' | '.join(there)}")
    return [there[name] for name in wanted]


def _between(what: str, root: Path) -> str:
    """What stands between the marks. what: the file, and the choices after it."""
    file, *choices = (part.strip() for part in what.split(";"))
    chosen = dict(choice.partition("=")[::2] for choice in choices)
    unknown = ", ".join(sorted(chosen.keys() - {"rows", "columns", "protocol"}))
    require(not unknown, f"{file}: {unknown} is no choice, only rows=, columns= and protocol=none are")
    found = read(root / file)
    rows = [Row(row["name"], row) for row in found["rows"]]
    name, *columns = columns_of(found, rows)
    there = {each.heading: each for column in columns for each in (column, _ratio(column, rows[0]))}
    if "columns" in chosen:
        columns = _chosen("column", there, chosen["columns"], file)
    if "rows" in chosen:
        rows = _chosen("row", {row.name: row for row in rows}, chosen["rows"], file)
    protocol = "" if chosen.get("protocol") == "none" else f"\nProtocol: {' '.join(found['protocol'])}\n"
    return f"{origin(found)}\n\n{markdown(rows, [name, *columns])}{protocol}"


if __name__ == "__main__":
    for changed in fill_all():
        print(changed.relative_to(ROOT))
