"""Recipes beside the model they were made of, over several draws of calibration text."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efflm.evaluate import quality
from efflm.evaluate.quality import Quality
from efflm.report import numbers, plots
from efflm.report.plots import Chart
from efflm.report.table import Column

BITS, SHARES = ("quantize", "gptq"), ("magnitude", "wanda", "sparsegpt")  # families of the two sweeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a recipe made of a model: means over seeds.

    over_dense: bits per byte over the model before, on the same documents; its stderr over documents, its deviation
    over seeds; None for the model before or one seed. saved: bytes, as a share of the model before. cost: over_dense
    divided by saved, and its error, of documents and seeds. passes: seconds to make it over those of a plain forward
    pass over the calibration text. memory: the model and the most held beyond it meanwhile, over the
    model's bytes.
    """

    name: str
    bytes: int
    seeds: int
    bits_per_byte: float
    perplexity: float
    perplexity_deviation: float | None = None
    over_dense: float | None = None
    over_dense_stderr: float | None = None
    over_dense_deviation: float | None = None
    kl: float | None = None
    saved: float = 0.0
    cost: float | None = None
    cost_error: float | None = None
    passes: float | None = None
    memory: float | None = None
    note: str = ""

    def words(self) -> str:
        over = " ".join(filter(None, numbers.with_error(self.over_dense, self.error, sign=True)))
        return f"{over} bits per byte over the model before, {self.saved:.1%} of its bytes saved"

    @property
    def error(self) -> float | None:
        """Of over_dense: of the documents, and of the mean over seeds; None of one document."""
        if self.over_dense_stderr is None:
            return None
        return math.hypot(self.over_dense_stderr, (self.over_dense_deviation or 0.0) / math.sqrt(self.seeds))


def first(name: str, before: Quality, nbytes: int) -> Row:
    """The model before."""
    return Row(
        name=name, bytes=nbytes, seeds=1,
        bits_per_byte=quality.bits_per_byte(before)[0], perplexity=quality.perplexity(before)[0],
    )  # fmt: skip


def row(
    name: str, before: Quality, made: Sequence[Quality], nbytes: int, dense: int, passes: float, memory: float | None
) -> Row:
    """A recipe's row. made: of each seed."""
    over, stderr, deviation = quality.mean_difference(made, before)
    perplexities = [quality.perplexity(each)[0] for each in made]
    saved = 1 - nbytes / dense
    found = Row(
        name=name,
        bytes=nbytes,
        seeds=len(made),
        bits_per_byte=float(np.mean([quality.bits_per_byte(each)[0] for each in made])),
        perplexity=float(np.mean(perplexities)),
        perplexity_deviation=quality.deviation(perplexities),
        over_dense=over,
        over_dense_stderr=stderr,
        over_dense_deviation=deviation,
        kl=float(np.mean([quality.divergence(each)[0] for each in made])),
        saved=saved,
        passes=passes,
        memory=memory,
    )
    if saved <= 0:
        return found
    error = None if found.error is None else found.error / saved
    return dataclasses.replace(found, cost=found.over_dense / saved, cost_error=error)


def _optional(value: float | None, form: str) -> str:
    return "—" if value is None else f"{value:{form}}"


def _over(row: Row) -> tuple[str, str]:
    if row.over_dense is None:
        return "reference", ""
    return numbers.with_error(row.over_dense, row.over_dense_stderr, sign=True)


COLUMNS = (
    Column("recipe", lambda row: row.name),
    Column("MB", lambda row: numbers.megabytes(row.bytes), lambda row: row.bytes),
    Column("bytes saved", lambda row: f"{row.saved:.1%}", lambda row: row.saved),
    Column("bits/byte", lambda row: f"{row.bits_per_byte:.4f}", lambda row: row.bits_per_byte),
    Column("over dense", _over, lambda row: row.over_dense),
    Column(
        "s.d. of seeds", lambda row: _optional(row.over_dense_deviation, ".4f"), lambda row: row.over_dense_deviation
    ),
    Column(
        "perplexity ± s.d.",
        lambda row: numbers.perplexity(row.perplexity, row.perplexity_deviation),
        lambda row: row.perplexity,
    ),
    Column("KL to dense", lambda row: _optional(row.kl, ".4f"), lambda row: row.kl),
    Column(
        "bits/byte lost ÷ bytes saved",
        lambda row: "—" if row.cost is None else numbers.with_error(row.cost, row.cost_error, sign=True),
        lambda row: row.cost,
    ),
    Column("forward passes", lambda row: _optional(row.passes, ".2f"), lambda row: row.passes),
    Column("peak memory", lambda row: "—" if row.memory is None else f"{row.memory:.2f}x", lambda row: row.memory),
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
    names, costs = [row.name for row in rows], [row.bytes / 1e6 for row in rows]
    losses, errors = [row.over_dense or 0.0 for row in rows], [row.error for row in rows]
    tips = [f"{row.name}: {row.bytes / 1e6:.4g} MB, {row.over_dense or 0.0:+.4f} bits/byte" for row in rows]
    figure, _, best = plots.tradeoff(names, costs, None, losses, errors, "MB on disk", tips)
    listed = ", ".join(names[i] for i in best)
    return plots.chart(
        figure, f"Loss against bytes, {len(rows)} models. Not beaten: {listed}.", f"Not beaten: {listed}."
    )


@dataclasses.dataclass(frozen=True)
class DomainRow:
    """Bits per byte over the model before on each test text, after calibration on `name`."""

    name: str
    over: Mapping[str, float]
    note: str = ""


Grid = Mapping[str, Mapping[str, float]]  # {calibration text: {test text: bits per byte over the model before}}


def domain_rows(grid: Grid) -> list[DomainRow]:
    return [DomainRow(name, over) for name, over in grid.items()]


def domain_columns(grid: Grid) -> tuple[Column, ...]:
    def column(test: str) -> Column:
        return Column(f"test: {test}", lambda row: f"{row.over[test]:+.4f}", lambda row: row.over[test])

    tests: dict[str, Any] = {test: None for over in grid.values() for test in over}
    return (Column("calibrated on", lambda row: row.name), *map(column, tests))
