"""The picture of README.md: the verdicts of a quickstart run, and loss against bytes.

`experiments.report runs/quickstart --publish` draws it anew of the results that it keeps.
"""

from pathlib import Path
from typing import Any

from efflm.report import plots, published, runs
from efflm.report.plots import Point
from efflm.report.runs import Run

RESULTS, PICTURE = published.FOLDER / "quickstart.json", published.ROOT / ".assets" / "quickstart.png"


def renew(results: Path = RESULTS, picture: Path = PICTURE) -> list[Path]:
    """Draw the picture if it is of other results than these. Gives the files that were written."""
    (run,) = runs.read([str(results)])
    if is_of(run, picture) or "verdicts" not in run.more:  # which were not kept before
        return []
    how = {"dpi": 100, "bbox_inches": None, "metadata": {"Software": None, "Description": run.machine}}
    plots.save(_drawn(run), picture, **how)
    return [picture]


def is_of(run: Run, picture: Path) -> bool:
    """Whether a picture is of this run."""
    return picture.exists() and run.machine.encode("latin-1") in picture.read_bytes()


def _drawn(run: Run) -> Any:
    """Of a run whose command compares models and writes its verdicts, of which the first sentence is shown."""
    increase = "bits_per_byte_increase"
    points = [
        Point(row.name, row.bytes / 1e6, row.at(increase) or 0.0, row.at(f"{increase}_stderr"), "") for row in run.rows
    ]
    first = lambda words: words.partition(". ")[0].removesuffix(".") + "."
    blocks = [(verdict["heading"], verdict["name"], first(verdict["words"])) for verdict in run.more["verdicts"]]
    return plots.beside(blocks, plots.tradeoff(points, "MB on disk")[0], run.machine)
