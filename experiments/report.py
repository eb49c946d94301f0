"""Results of several runs in one table of one page.

    bash launch/run.sh experiments.report runs/quickstart runs/compress
    bash launch/run.sh experiments.report laptop.json server.json --run_dir=runs/both
    bash launch/run.sh experiments.report runs/quickstart --publish

Expect a table of each run in the terminal, and in the run directory report.html with all rows in one table, to filter
and to download. It reads what evaluate, compress, quickstart and sweep have written; nothing is measured. A row is
compared with the first row of its own run alone, and it is said in what the runs differ: machine, commit, text,
protocol.

With --publish no page is made: the results are copied to experiments/results/ under the names of their run directories,
and of what is there the tables and pictures of all .md files are made anew (efflm/report/published.py, picture.py).
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
    for each in found:  # side by side they would be too wide for a terminal
        print(f"{each.name}: {each.machine}")
        own, shown = runs.side_by_side([each])
        table.show(own, each.protocol, shown)
    apart, *protocols = runs.facts(found)
    print(apart)
    page.write(
        folder / "report.html",
        title=f"{len(found)} runs" if len(found) > 1 else f"The run {found[0].name}",
        sections=runs.sections(found, rows, columns),
        facts=[apart, *protocols],
        made={each.name: each.machine for each in found},
        command=command_line("experiments.report", sys.argv),
    )
    print(f"done: open {folder / 'report.html'}")


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
