"""Does a result hold with other seeds and other text? A claim, or a row of any results.json, is measured again.

    bash launch/run.sh experiments.refute --claim=8 --seed=100
    bash launch/run.sh experiments.refute --row=w4a16 --results=runs/quickstart/results.json --seed=100
    bash launch/run.sh experiments.refute --row=gptq4 --results=runs/compress/results.json --text=books/

Expect a table of each figure as it was and as it is now, and whether it held: a verdict if it is the same, a figure if
the two differ by at most two standard errors of their difference. results.json in the run directory has it too.

A claim is measured with as many seeds as before, from --seed on, at the same sizes, and scored on validation text in
place of test text, or trained and scored on another --corpus. A row is measured by the command of its results.json,
with --seed, and --text or --corpus where they are given and that command has them.
"""

import dataclasses
import importlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.config import InputError, flag, require, require_seed
from efflm.config.model import ModelShape
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate.windows import Scoring
from efflm.report import numbers, table
from efflm.report.journal import Journal
from efflm.report.rows import Row
from efflm.report.table import figure
from experiments import claims

ERRORS = ("_stderr", "_deviation", "_sd")
WITHIN = 2.0  # standard errors of the difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    claim: int = flag(0, "number of a claim that --results has")
    row: str = flag("", "or the name of a row of it")
    results: str = flag(str(run_directory.ROOT / "claims" / "results.json"), "what was measured before", path=True)
    seed: int = flag(100, "first of the new seeds")
    corpus: str = flag("", "other text to train on and to score; empty: as before", path=True)
    text: str = flag("", "other text to score, of commands with --text", path=True)
    run_dir: str = flag(str(run_directory.ROOT / "refute"), "where everything is written", path=True)

    def __post_init__(self):
        require_seed(self.seed)


COLUMNS = (
    figure("figure", "name", str),
    figure("before", "before", numbers.with_error, "before_stderr"),
    figure("now", "now", numbers.with_error, "now_stderr"),
    figure("verdict before", "verdict_before", str),
    figure("verdict now", "verdict_now", str),
    figure("held", "held", str),
)


@run_directory.locked
def main(run: Run) -> None:
    require(bool(run.claim) != bool(run.row), "give one of claim and row: what is to be measured again")
    log, before = Journal(run.run_dir, command_line("experiments.refute", sys.argv)), read(Path(run.results))
    rows = of_claim(run, before) if run.claim else of_row(run, before)
    failed = [row.name for row in rows if not row.held]
    what = f"Claim {run.claim}" if run.claim else run.row
    facts = [f"{what} held." if not failed else f"{what} did not hold: {', '.join(failed)}."]
    facts += [f"With seeds from {run.seed} on; a figure holds within {WITHIN:g} standard errors of the difference."]
    shown = [row.but(held="yes" if row.held else "NO") for row in rows]
    table.show(shown, facts, table.known(shown, COLUMNS))
    log.results(facts, rows=rows, held=not failed)


def read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        _ = found["rows"], found["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no results.json ({error!r:.80}): give --results") from None
    return found


def compared(name: str, before: Any, now: Any, verdicts: tuple[str, str] | None = None) -> Row:
    """before, now: a figure and its standard error, None where it is not known."""
    (old, old_error), (new, new_error) = before, now
    known = old is not None and new is not None
    error = math.hypot(old_error or 0.0, new_error or 0.0)
    close = known and abs(new - old) <= WITHIN * error + 1e-9 * abs(old)
    told = verdicts or (None, None)
    figures = {"before": old, "before_stderr": old_error, "now": new, "now_stderr": new_error}
    figures |= {"verdict_before": told[0], "verdict_now": told[1]}
    return Row(name, figures | {"held": told[0] == told[1] if verdicts else close})


# --- a claim ---------------------------------------------------------------------------------------------------------


def of_claim(run: Run, before: dict[str, Any]) -> list[Row]:
    number, began = str(run.claim), before.get("began", {})
    measured = before.get("claims", {})
    require(number in measured, f"{run.results} has no claim {number}, only {', '.join(measured) or 'none'}")
    again = claims.Run(
        claims=(run.claim,),
        seed=run.seed,
        seeds=len(measured[number]["seeds"]),
        corpus=run.corpus or began["corpus"],
        split="test" if run.corpus or began["split"] == "validation" else "validation",
        run_dir=str(Path(run.run_dir) / "again"),
    )
    sizes = ModelShape(**began["model"]), TrainConfig(**began["train"]), Scoring(**began["score"])
    claims.main(again, *sizes, MeshConfig())
    after = read(Path(again.run_dir) / "results.json")
    kept = lambda found: {row["name"]: row for row in found["rows"] if row["name"].startswith(f"{number}.")}
    old, new = kept(before), kept(after)
    ruled = [name for name in old if old[name]["verdict"] != "recorded"]
    return [
        compared(name, of(old[name]), of(new[name]), (old[name]["verdict"], new[name]["verdict"])) for name in ruled
    ]


def of(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """The mean over seeds and its standard error."""
    deviation = row["effect_sd"]
    return row["effect"], None if deviation is None else deviation / math.sqrt(row["seeds"])


# --- a row -----------------------------------------------------------------------------------------------------------


def of_row(run: Run, before: dict[str, Any]) -> list[Row]:
    old = named(before, run.row, run.results)
    _, _, module, *flags = shlex.split(before["command"])  # bash launch/run.sh MODULE --FLAGS
    own = vars(importlib.import_module(module))
    known = {field.name for field in dataclasses.fields(own["RUN"] if "RUN" in own else own["Run"])}
    other = {"seed": run.seed, "text": run.text, "corpus": run.corpus}
    changed = {name: value for name, value in other.items() if value != "" and name in known}
    require(bool(changed), f"{module} has neither a seed nor a text to change: give --text or --corpus")
    folder = Path(run.run_dir) / "again"
    command = [sys.executable, "-m", module, *flags, f"--run_dir={folder}"]
    command += [f"--{name}={value}" for name, value in changed.items()]
    print(shlex.join(command), flush=True)
    code = subprocess.run(command).returncode
    require(code == 0, f"{module} ended with {code}: see its output above")
    new = named(read(folder / "results.json"), run.row, "the new run")
    pairs = [(name, name + end) for end in ERRORS for name in old if isinstance(old.get(name + end), float)]
    require(bool(pairs), f"the row {run.row} has no figure with an error to compare within")
    return [compared(name, (old[name], old[error]), (new.get(name), new.get(error))) for name, error in pairs]


def named(found: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    there = {row["name"]: row for row in found["rows"]}
    require(name in there, f"{file} has no row {name!r}, only {', '.join(there)}")
    return there[name]


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
