"""Models measured side by side: quality, then speed, all in turn."""

import dataclasses
from typing import Any

import jax

from efflm import ops
from efflm.evaluate import scoring, throughput
from efflm.evaluate.quality import Quality
from efflm.evaluate.throughput import Protocol, Rate
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured, by the model's name, and in words how. rates: prefill and decode by the protocol; None where
    speed was not measured."""

    qualities: dict[str, Quality]
    rates: dict[str, tuple[Rate, Rate]] | None
    protocol: Protocol
    facts: tuple[str, ...]


def measure(models: dict[str, LanguageModel], text: Any, tokenizer: Any, score: Scoring, speed: bool = True) -> Figures:
    """Score a text (see data.dataset.Text) and time prefill and decode.

    models: not prepared for kernels yet; differences are those to the first. score: as `Scoring.within` says.
    """
    first = next(iter(models))
    here = {name: ops.prepare(model, jax.default_backend()) for name, model in models.items()}
    found = scoring.measure(here, text, tokenizer, score, here[first])
    protocol = throughput.protocol_for(models[first])
    rates, load = throughput.rates(here, protocol) if speed else (None, "")
    against = f" Divergence: from {first}." if len(models) > 1 else ""
    facts = [f"Quality: {scoring.protocol(text, score, found[first])}.{against}"]
    return Figures(found, rates, protocol, (*facts, *[f"Speed: {protocol}.{load}"] * speed))
