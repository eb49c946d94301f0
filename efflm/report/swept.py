"""Recipes beside the model they were made of, over several draws of calibration text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efflm.evaluate import quality
from efflm.evaluate.quality import Quality
from efflm.report import numbers, plots
from efflm.report.plots import Chart, Point
from efflm.report.rows import Row
from efflm.report.table import Column, figure

BITS, SHARES = ("quantize", "gptq"), ("magnitude", "wanda", "sparsegpt")  # families of the two sweeps


def first(name: str, before: Quality, nbytes: int) -> Row:
    """The model before: what the other rows say of it is None."""
    figures = {"bits_per_byte": quality.bits_per_byte(before)[0], "perplexity": quality.perplexity(before)[0]}
    return _row(name, bytes=nbytes, seeds=1, **figures)


def row(
    name: str, before: Quality, made: Sequence[Quality], nbytes: int, dense: int, passes: float, memory: float | None
) -> Row:
    """What a recipe made of a model. made: of each seed.

    Its figures are means over seeds. over_dense: bits per byte over the model before, on the same documents; its
    stderr over documents, its deviation over seeds; error: of both, None of one document. saved: bytes, as a share of
    the model before. cost: over_dense divided by saved. passes: seconds to make it over those of a plain forward pass
    over the calibration text. memory: the model and the most held beyond it meanwhile, over the model's bytes.
    """
    over, stderr, deviation = quality.mean_difference(made, before)
    perplexities, saved = [quality.perplexity(each)[0] for each in made], 1 - nbytes / dense
    error = None if stderr is None else math.hypot(stderr, (deviation or 0.0) / math.sqrt(len(made)))
    return _row(
        name,
        bytes=nbytes,
        seeds=len(made),
        bits_per_byte=float(np.mean([quality.bits_per_byte(each)[0] for each in made])),
        perplexity=float(np.mean(perplexities)),
        perplexity_deviation=quality.deviation(perplexities),
        over_dense=over,
        over_dense_stderr=stderr,
        over_dense_deviation=deviation,
        error=error,
        kl=float(np.mean([quality.divergence(each)[0] for each in made])),
        saved=saved,
        cost=over / saved if saved > 0 else None,
        cost_error=error / saved if saved > 0 and error is not None else None,
        passes=passes,
        memory=memory,
    )


def _row(name: str, **figures: Any) -> Row:
    names = ("perplexity_deviation", "over_dense", "over_dense_stderr", "over_dense_deviation", "error", "kl")
    return Row(name, {**dict.fromkeys((*names, "cost", "cost_error", "passes", "memory")), "saved": 0.0, **figures})


def words(row: Row) -> str:
    over = " ".join(filter(None, numbers.signed(row.over_dense, row.error)))
    return f"{over} bits per byte over the model before, {row.saved:.1%} of its bytes saved"


FOUR, TIMES = "{:.4f}".format, "{:.2f}x".format
COLUMNS = (
    figure("recipe", "name", str),
    figure("MB", "bytes", numbers.megabytes),
    figure("bytes saved", "saved", "{:.1%}".format),
    figure("bits/byte", "bits_per_byte", FOUR),
    figure("over dense", "over_dense", numbers.signed, "over_dense_stderr", "reference"),
    figure("s.d. of seeds", "over_dense_deviation", FOUR),
    figure("perplexity ± s.d.", "perplexity", numbers.perplexity, "perplexity_deviation"),
    figure("KL to dense", "kl", FOUR),
    figure("bits/byte lost ÷ bytes saved", "cost", numbers.signed, "cost_error"),
    figure("forward passes", "passes", "{:.2f}".format),
    figure("peak memory", "memory", TIMES),
)


def sweep(rows: Sequence[Row], families: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{family: (settings, perplexities, deviations)} of the rows FAMILY@NUMBER, by ascending number."""
    found = {}
    for family in families:
        points = sorted(
            (float(row.name.partition("@")[2]), row.perplexity, row.perplexity_deviation or 0.0)
            for row in rows
            if re.fullmatch(rf"{family}@[\d.]+", row.name)
        )
        if points:
            found[family] = tuple(np.array(values) for values in zip(*points))
    return found


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Perplexity against bits, and against sparsity, where there are such rows."""
    drawn = []
    for families, across, of in (
        (BITS, "bits of a weight", "bits"),
        (SHARES, "share of the weights removed", "sparsity"),
    ):
        found = sweep(rows, families)
        if not found:
            continue
        figure = plots.sweeps(found, across, "perplexity", rows[0].perplexity)
        ends = "; ".join(
            f"{name}: " + ", ".join(f"{x:g} {y:.4g}" for x, y in zip(xs, ys)) for name, (xs, ys, _) in found.items()
        )
        alt = f"Perplexity against {of}; {rows[0].perplexity:.4g} before. {ends}."
        drawn.append(
            plots.chart(figure, alt, f"Perplexity against {of}; dotted: the model before. Bars: s.d. of seeds.")
        )
    return drawn


def front(rows: Sequence[Row]) -> Chart:
    """Loss against bytes, and the recipes that no other one beats in both."""
    points = []
    for row in rows:
        cost, loss = row.bytes / 1e6, row.over_dense or 0.0
        points.append(Point(row.name, cost, loss, row.error, f"{row.name}: {cost:.4g} MB, {loss:+.4f} bits/byte"))
    figure, best = plots.tradeoff(points, "MB on disk")
    listed = f"Not beaten: {', '.join(each.name for each in best)}."
    return plots.chart(figure, f"Loss against bytes, {len(rows)} models. {listed}", listed)


Grid = Mapping[str, Mapping[str, float]]  # {calibration text: {test text: bits per byte over the model before}}


def domain_rows(grid: Grid) -> list[Row]:
    return [Row(name, over) for name, over in grid.items()]


def domain_columns(grid: Grid) -> tuple[Column, ...]:
    tests = dict.fromkeys(test for over in grid.values() for test in over)
    columns = (figure(f"test: {test}", test, "{:+.4f}".format) for test in tests)
    return (figure("calibrated on", "name", str), *columns)
