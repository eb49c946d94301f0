"""Where compressed models fail, as tables: what each row has for each of several groups of tokens or texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from efflm.evaluate.quality import Figure
from efflm.report import numbers, page, plots
from efflm.report.plots import Chart
from efflm.report.rows import Row, with_errors
from efflm.report.table import Column, figure, of_texts

Grid = Mapping[str, Figure]  # {test text: figure}


def told(groups: Mapping[str, Figure]) -> dict[str, dict[str, float | None]]:
    """Figures by group, as a row has them."""
    return {group: {"value": value, "stderr": error} for group, (value, error) in groups.items()}


def columns(rows: Sequence[Row], name: str, form: Callable[..., Any]) -> list[Column]:
    """Of the figures by group that rows have under this name, a column for each group."""
    groups = dict.fromkeys(group for row in rows for group in row.figures[name])
    path = lambda group, what: (name, group, what)
    shown = [figure(g, path(g, "value"), form, path(g, "stderr")) for g in groups]
    return [figure("model", "name", str), *shown]


def share(value: float, error: float | None) -> tuple[str, str]:
    return numbers.percent(value, error, most=1)


def tables(rows: Sequence[Row]) -> dict[str, page.Table]:
    """Of all that rows of a run of experiments.limits have by group, by the place that it has on the page."""
    position = "Bits a token by the tokens before it: of the first model, and what the others have more."
    frequency = (
        "The share of next tokens that are not the first model's likeliest any more, by how often the token that comes "
        "is in the training text."
    )
    sure = "How far the confidence in the likeliest token is from how often it is right; the difference to the first."
    made = {
        "position": (position, columns(rows, "by_position", numbers.with_error)),
        "frequency": (frequency, columns(rows, "by_frequency", share)),
        "calibration": (sure, columns(rows, "calibration", numbers.with_error)),
    }
    alone = [
        Row(row.name, {name: row.at(name) for name in ("by_position", "by_frequency", "calibration")}) for row in rows
    ]
    return {name: page.Table(caption=caption, columns=shown, rows=alone) for name, (caption, shown) in made.items()}


def domains(grids: Mapping[str, Mapping[str, Grid]], of: str = "") -> page.Table:
    """A row for each chain and text that it was made from; columns: of each test text. grids: {chain: {text: {test
    text: bits per byte over the first model, and the error}}}. of: which run."""
    increase = lambda over: {test: with_errors({"bits_per_byte_increase": each}) for test, each in over.items()}
    found = [(chain, text, over) for chain, grid in grids.items() for text, over in grid.items()]
    rows = [Row(chain, {"text": text, "domains": increase(over)}) for chain, text, over in found]
    columns = [figure("chain", "name", str), figure("made from", "text", str), *of_texts(rows)]
    caption = f"{of}Bits per byte over the first model, by the text that a chain is made from and the test text."
    return page.Table(caption=caption, columns=columns, rows=rows)


def curves(chain: str, found: Mapping[str, Any]) -> Chart:
    """The losses along the training of a chain. found: {text: (steps, losses)}."""
    drawn = {name: tuple(map(np.asarray, each)) for name, each in found.items()}
    ends = ", ".join(f"{name} {ys[0]:.3f} to {ys[-1]:.3f}" for name, (_, ys) in drawn.items())
    words = f"{chain}: cross-entropy along its training, nats a token: {ends}."
    return plots.chart(plots.curves(drawn, "steps", "loss, nats a token"), words, words)
