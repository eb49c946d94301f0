"""The rows of models that were measured side by side, printed as a table."""

import dataclasses
from collections.abc import Iterator

from efflm.evaluate.scoring import Figures
from efflm.model import LanguageModel
from efflm.report import notebook, rows, table
from efflm.report.comparison import Comparison, Limits
from efflm.report.rows import Row


@dataclasses.dataclass(frozen=True, repr=False)
class Measured:
    """A row for each model, in order, by its index or name; printed, and in a notebook, a table with facts below it."""

    rows: tuple[Row, ...]
    facts: tuple[str, ...]
    figures: Figures

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
        rates, first = self.figures.rates or {}, self.rows[0].name
        pairs = {name: (own, rates[first]) for name, own in rates.items()}
        return Comparison(self.rows, limits, self.figures.qualities, pairs, self.figures.answers)

    def __str__(self) -> str:
        return table.text(self.rows, self.facts, table.known(self.rows, table.columns(self.rows)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return notebook.shown(self.rows, self.facts)


def of(models: dict[str, LanguageModel], sizes: dict[str, int], notes: dict[str, str], found: Figures) -> Measured:
    """sizes: bytes on disk. notes: what each model is, in words."""
    made = rows.collect(models, sizes, notes, found.qualities, found.rates, found.noise, found.answers)
    return Measured(tuple(made), (*found.facts, rows.BITS), found)
