"""The pictures of .md files that are drawn of kept results: the verdicts of a quickstart run with loss against bytes in
README.md, and quality against bytes beside other programs in experiments/results.

`experiments.report RUNS --publish` draws those anew whose results changed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from efflm.report import plots, published, runs
from efflm.report.plots import Point
from efflm.report.runs import Run

FOLDER = published.ROOT / ".assets"


def renew(results: Path = published.FOLDER, folder: Path = FOLDER) -> list[Path]:
    """Draw the pictures that are of other results than these. Gives the files that were written."""
    stale = [(run, draw, folder / f"{run.name}.png") for run, draw in drawn(results)]
    stale = [(run, draw, file) for run, draw, file in stale if not is_of(run, file)]
    for run, draw, file in stale:
        about = {"Software": None, "Description": run.machine}
        around = "tight" if draw is _programs else None  # names stand beside its axes
        plots.save(draw(run), file, dpi=100, bbox_inches=around, metadata=about)
    return [file for _, _, file in stale]


def drawn(results: Path = published.FOLDER) -> list[tuple[Run, Callable[[Run], Any]]]:
    """The kept results of which there is a picture, and what draws it."""
    found = runs.read(sorted(str(file) for file in results.glob("*.json")))
    of_programs = lambda run: all("program" in row.figures for row in run.rows)
    compared = [(run, _programs) for run in found if run.rows and of_programs(run)]
    return [(run, _verdicts) for run in found if "verdicts" in run.more and run.name == "quickstart"] + compared


def is_of(run: Run, picture: Path) -> bool:
    """Whether a picture is of this run."""
    return picture.exists() and run.machine.encode("latin-1") in picture.read_bytes()


def _verdicts(run: Run) -> Any:
    """Of a run whose command compares models and writes its verdicts, of which the first sentence is shown."""
    increase = "bits_per_byte_increase"
    points = [
        Point(row.name, row.bytes / 1e6, row.at(increase) or 0.0, row.at(f"{increase}_stderr"), "") for row in run.rows
    ]
    first = lambda words: words.partition(". ")[0].removesuffix(".") + "."
    blocks = [(verdict["heading"], verdict["name"], first(verdict["words"])) for verdict in run.more["verdicts"]]
    return plots.beside(blocks, plots.tradeoff(points, "MB on disk")[0], run.machine)


def _programs(run: Run) -> Any:
    """KL against bits a weight: of each program, with and without calibration, the files that none of its own beats."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in sorted(run.rows, key=lambda row: (row.bits_a_weight, row.kl_to_original)):
        series = found.setdefault(row.program + ", calibrated" * (row.calibrated == "yes"), [])
        if not series or row.kl_to_original < series[-1][1]:
            series.append((row.bits_a_weight, row.kl_to_original, row.kl_to_original_stderr))
    # In this order those that are in all pictures come first, and have the same colours in each.
    columns = {name: tuple(np.array(values).T) for name, values in sorted(found.items(), reverse=True)}
    return plots.sweeps(columns, "bits a weight, all in", "KL to the floats, nats a token", run.more.get("noise", 0.0))
