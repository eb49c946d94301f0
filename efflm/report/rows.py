"""The evidence: one row for each model, measured side by side."""

import dataclasses

import jax
import numpy as np

from efflm import trees
from efflm.evaluate import cost, quality
from efflm.evaluate.cost import Protocol
from efflm.evaluate.quality import Quality
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a model is, what it costs here, and how good it is.

    Spreads are the quartiles of the repeats. The difference to the dense model is paired over documents, so its
    error is far below that of either alone.
    """

    name: str
    parameters: int
    nonzeros: int
    bytes: int
    prefill_tokens_per_second: float
    prefill_spread: tuple[float, float]
    decode_tokens_per_second: float
    decode_spread: tuple[float, float]
    bits_per_byte: float
    bits_per_byte_stderr: float
    bits_per_byte_over_dense: float
    bits_per_byte_over_dense_stderr: float
    kl_to_dense: float
    top1_agreement: float
    note: str


def collect(
    models: dict[str, LanguageModel],
    sizes: dict[str, int],
    notes: dict[str, str],
    test: dict[str, np.ndarray],
    token_bytes: np.ndarray,
    reference: LanguageModel,
    protocol: Protocol,
) -> tuple[list[Row], dict[str, Quality]]:
    """A row for each model, in order, and the sums by document behind it.

    sizes: bytes on disk. notes: what was done, to which the measured speeds are added in words. Speeds and bits
    are compared with the first model's; divergence and agreement are against `reference`. All run on one device.
    """
    one = jax.devices()[0]
    models, reference = (
        {name: jax.device_put(model, one) for name, model in models.items()},
        jax.device_put(reference, one),
    )
    qualities = quality.measure(models, test, token_bytes, reference)
    rates = cost.rates(models, protocol)
    first = next(iter(models))
    rows = []
    for name, model in models.items():
        (prefill, decode), measured = rates[name], qualities[name]
        bits, error = quality.bits_per_byte(measured)
        over, over_error = quality.paired_difference(measured, qualities[first])
        words = [notes.get(name, "")]
        if name != first:
            words.append(_speed(prefill, rates[first][0], "prefill"))
            words.append(_speed(decode, rates[first][1], "decode"))
        rows.append(
            Row(
                name=name,
                parameters=trees.count(model.params),
                nonzeros=trees.nonzeros(model.params),
                bytes=sizes[name],
                prefill_tokens_per_second=round(prefill.median, 1),
                prefill_spread=(round(prefill.low, 1), round(prefill.high, 1)),
                decode_tokens_per_second=round(decode.median, 1),
                decode_spread=(round(decode.low, 1), round(decode.high, 1)),
                bits_per_byte=bits,
                bits_per_byte_stderr=error,
                bits_per_byte_over_dense=over,
                bits_per_byte_over_dense_stderr=over_error,
                kl_to_dense=measured.mean_kl,
                top1_agreement=measured.top1_agreement,
                note="; ".join(word for word in words if word),
            )
        )
    return rows, qualities


def _speed(rate: cost.Rate, base: cost.Rate, phase: str) -> str:
    """A measured ratio in words; where the quartiles of both overlap, no difference is claimed."""
    ratio = rate.median / base.median
    overlap = rate.low <= base.high and base.low <= rate.high
    return f"{phase} {ratio:.2f}x the first row" + (" (within the spread)" if overlap else "")
