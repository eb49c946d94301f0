"""Chains of steps beside the model they were made of: means over seeds."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efflm import ops, trees
from efflm.evaluate import quality
from efflm.evaluate.quality import Quality
from efflm.model import LanguageModel
from efflm.report import numbers, plots, table
from efflm.report.plots import Chart
from efflm.report.rows import Row, bits_a_weight
from efflm.report.table import figure

BITS, SHARES = ("quantize", "gptq"), ("magnitude", "wanda", "sparsegpt")  # families of the two sweeps
OVER = (
    "bits_per_byte_increase",
    "bits_per_byte_increase_stderr",
    "bits_per_byte_increase_deviation",
    "error",
    "kl_to_original",
    "cost",
    "cost_error",
)
TOOK = ("recovered", "calibration", "passes", "memory", "prefill_speedup", "decode_speedup")


def alone(name: str, model: LanguageModel, made: Sequence[Quality], tied: bool = False, **figures: Any) -> Row:
    """The row of the first model: what the others say beside it is None. made: as in `row`; tied: in rows.make."""
    size = ops.stored_nbytes(model.params, model.masks)
    perplexities = [quality.perplexity(each)[0] for each in made]
    own = {
        "parameters": trees.count(model.params),
        "bytes": size,
        "bits_a_weight": bits_a_weight(model, size, tied),
        "seeds": len(made),
        "bits_per_byte": float(np.mean([quality.bits_per_byte(each)[0] for each in made])),
        "perplexity": float(np.mean(perplexities)),
        "perplexity_deviation": quality.deviation(perplexities),
    }
    none = dict.fromkeys((*OVER, *TOOK)) | {"saved": 0.0, "tokens": 0, "seconds": 0.0}
    return Row(name, own | none | figures)


def row(name: str, model: LanguageModel, made: Sequence[Quality], before: Quality, first: Row, **figures: Any) -> Row:
    """What a chain made of the first model. model: of the last seed; made: of each.

    Figures are means over seeds. bits_per_byte_increase: over the first model, on the same documents; its stderr over
    documents, its deviation over seeds; error: of both, None of one document. saved: bytes, as a share of the first
    model's. cost: that increase divided by saved. recovered: the share that training took away of the loss that what
    came before it had brought. tokens, seconds: of the steps that train. passes: seconds to make the model over those
    of a plain forward pass over the calibration text. memory: the most bytes held meanwhile beyond what was held
    before. calibration: the expected calibration error (evaluate.quality).
    """
    over, stderr, deviation = quality.mean_difference(made, before)
    error = None if stderr is None else math.hypot(stderr, (deviation or 0.0) / math.sqrt(len(made)))
    own = alone(name, model, made, **figures)
    saved = 1 - own.bytes / first.bytes
    return own.but(
        bits_per_byte_increase=over,
        bits_per_byte_increase_stderr=stderr,
        bits_per_byte_increase_deviation=deviation,
        error=error,
        kl_to_original=float(np.mean([quality.divergence(each)[0] for each in made])),
        saved=saved,
        cost=over / saved if saved > 0 else None,
        cost_error=error / saved if saved > 0 and error is not None else None,
    )


def recovered(parts: Sequence[str], train: Sequence[bool], row: Row, found: Mapping[str, Row]) -> float | None:
    """The share that the parts which train, after all that do not, took away of the loss before them. found: of each
    chain so far."""
    cut = train.index(True) if any(train) else len(parts)
    base = found.get(",".join(parts[:cut])) if 0 < cut < len(parts) and all(train[cut:]) else None
    return (
        1 - row.bits_per_byte_increase / base.bits_per_byte_increase
        if base and base.bits_per_byte_increase > 0
        else None
    )


def words(row: Row) -> str:
    over = " ".join(filter(None, numbers.signed(row.bits_per_byte_increase, row.error)))
    return f"{over} bits per byte over the first model, {row.saved:.1%} of its bytes saved"


FOUR, TIMES = "{:.4f}".format, "{:.2f}x".format
some = lambda form: lambda value: form(value) if value else table.NONE  # of what there is nothing of without training
COLUMNS = (
    figure("chain", "name", str),
    figure("parameters", "parameters", numbers.millions),
    figure("MB", "bytes", numbers.megabytes),
    dataclasses.replace(table.BITS, group=""),
    figure("bytes saved", "saved", "{:.1%}".format),
    figure("bits/byte", "bits_per_byte", FOUR),
    figure(
        "increase over the original",
        "bits_per_byte_increase",
        numbers.signed,
        "bits_per_byte_increase_stderr",
        "reference",
        0.0,
    ),
    figure("s.d. of seeds", "bits_per_byte_increase_deviation", FOUR),
    figure("perplexity ± s.d.", "perplexity", numbers.perplexity, "perplexity_deviation"),
    figure("KL to the original", "kl_to_original", FOUR),
    figure("bits/byte lost ÷ bytes saved", "cost", numbers.signed, "cost_error"),
    figure("recovered", "recovered", "{:.0%}".format),
    figure("tokens trained on", "tokens", some("{:,}".format)),
    figure("seconds to train", "seconds", some("{:.0f}".format)),
    figure("calibration error", "calibration", FOUR),
    figure("forward passes", "passes", "{:.2f}".format),
    figure("MB to make it", "memory", numbers.megabytes, least=0.0),
    figure("prefill speedup", "prefill_speedup", TIMES),
    figure("decode speedup", "decode_speedup", TIMES),
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
