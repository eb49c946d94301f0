"""Results of several runs in one table and one page.

    bash launch/run.sh experiments.report runs/quickstart runs/compress
    bash launch/run.sh experiments.report laptop.json server.json --run_dir=runs/both
    bash launch/run.sh experiments.report runs/quickstart --publish

Expect a table of all rows in the terminal, run by run, and report.html in the run directory. It reads what evaluate,
compress, quickstart and sweep have written; nothing is measured. A row is compared with the first row of its own run
alone, and below the table stands in what the runs differ: machine, commit, text, protocol.

With --publish no page is made: the results are copied to experiments/results/ under the names of their run directories,
and of what is there the tables of all .md files and the picture of README.md are made anew (efflm/report/published.py).
"""

import dataclasses
import sys
from pathlib import Path

from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.config import flag, require
from efflm.report import page, picture, published, runs, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    results: tuple[str, ...] = flag((), "results.json files, or run directories that hold one", bare=True)
    run_dir: str = flag(str(run_directory.ROOT / "report"), "where to write report.html", path=True)
    publish: bool = flag(False, "keep the results in experiments/results, and make the tables of all .md files anew")

    def __post_init__(self):
        folder = Path(self.run_dir).resolve()
        own = any(folder in (Path(each).resolve(), Path(each).resolve().parent) for each in self.results)
        require(not own, f"run_dir is {self.run_dir}, whose own report this would replace: give another")


@run_directory.locked
def main(run: Run) -> None:
    if run.publish:
        for path in [*map(published.keep, run.results), *published.fill_all(), *picture.renew()]:
            print(f"wrote {path}")
        return
    require(bool(run.results), "there is nothing to read: give results.json files or run directories, as in runs/a")
    folder = Path(run.run_dir)
    run_directory.require_writable(folder, needs=run_directory.SMALL_FILES)
    found = runs.read(run.results)
    rows, columns = runs.side_by_side(found)
    facts = runs.facts(found)
    for kind in (False, True):  # side by side they would be too wide for a terminal
        of_kind = [each for each in found if runs.is_swept(each) is kind]
        shown, own = runs.side_by_side(of_kind)
        if shown:
            notes_left_out = [dataclasses.replace(row, note="") for row in shown]
            table.show(notes_left_out, [], [table.figure("run", "run", str), *own])
    for fact in facts:
        print(f"  {fact}")
    page.write(
        folder / "report.html",
        title=f"{len(found)} runs" if len(found) > 1 else f"The run {found[0].name}",
        sections=runs.sections(found, rows, columns),
        facts=facts,
        made={each.name: each.machine for each in found},
        command=command_line("experiments.report", sys.argv),
    )
    print(f"done: open {folder / 'report.html'}")


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
