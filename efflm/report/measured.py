"""Models measured side by side: their rows, and how they were measured."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from efflm import ops
from efflm.evaluate import throughput
from efflm.evaluate.quality import Quality
from efflm.evaluate.throughput import Protocol, Rate
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel
from efflm.report import rows, scoring, table
from efflm.report.comparison import Comparison, Limits
from efflm.report.rows import Row


@dataclasses.dataclass(frozen=True, repr=False)
class Measured:
    """A row for each model, in order, by its index or name; printed, the table with the facts below it.

    rates: prefill and decode by the model's name, by the protocol; None where speed was not measured.
    """

    rows: tuple[Row, ...]
    facts: tuple[str, ...]
    qualities: dict[str, Quality]
    rates: dict[str, tuple[Rate, Rate]] | None
    protocol: Protocol

    def __getitem__(self, which: int | str) -> Row:
        if isinstance(which, int):
            return self.rows[which]
        found = {row.name: row for row in self.rows}
        if which not in found:
            raise KeyError(f"there is no row {which!r}: the rows are {', '.join(found)}")
        return found[which]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def comparison(self, limits: Limits) -> Comparison:
        """The rows with what their figures were made of, from which verdicts are made."""
        rates, first = self.rates or {}, self.rows[0].name
        return Comparison(self.rows, limits, self.qualities, {name: (own, rates[first]) for name, own in rates.items()})

    def __str__(self) -> str:
        return table.text(self.rows, self.facts, table.measured(self.rows))

    __repr__ = __str__


def compare(
    models: dict[str, LanguageModel],
    sizes: dict[str, int],
    notes: dict[str, str],
    text: Any,
    tokenizer: Any,
    score: Scoring,
    speed: bool = True,
) -> Measured:
    """Score a text (see data.dataset.Text) and time prefill and decode, all models in turn.

    models: not prepared for kernels yet. sizes: bytes on disk. notes: what each model is, in words. score: as
    `Scoring.within` says. Differences are those to the first model.
    """
    first = next(iter(models))
    here = {name: ops.prepare(model, jax.default_backend()) for name, model in models.items()}
    found = scoring.measure(here, text, tokenizer, score, here[first])
    protocol = throughput.protocol_for(models[first])
    rates, load = throughput.rates(here, protocol) if speed else (None, "")
    against = f" Divergence: from {first}." if len(models) > 1 else ""
    facts = [f"Quality: {scoring.protocol(text, score, found[first])}.{against}"]
    facts += [f"Speed: {protocol}.{load}"] * speed
    return Measured(tuple(rows.collect(models, sizes, notes, found, rates)), tuple(facts), found, rates, protocol)
