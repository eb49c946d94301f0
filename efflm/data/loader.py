"""Which packed rows a step trains on: a function of seed and step only, so the state of the data is the global step."""

import dataclasses
from collections.abc import Callable

import numpy as np

from efflm.config import require
from efflm.data.packing import FIELDS, Rows, Stream


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of some rows, read when it is indexed: of a batch spread over hosts, each reads only its own part."""

    rows: Rows | Stream
    which: np.ndarray
    field: str

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.which), self.rows.length

    @property
    def ndim(self) -> int:
        return 2

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        own, columns = index
        return self.rows[self.which[own]][self.field][:, columns]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:, :], dtype)


def require_one_batch(rows: Rows | Stream, batch: int, lower: str = "the batch or its length") -> None:
    """Raise InputError if the rows do not fill it. lower: what the caller can make smaller."""
    require(
        len(rows) >= batch,
        f"the corpus is too small: {len(rows)} rows of {rows.length} tokens do not fill one batch of {batch}: "
        f"give more text, or lower {lower}",
    )


def batches(rows: Rows | Stream, batch: int, seed: int) -> Callable[[int], dict[str, Column]]:
    """step -> its `batch` rows, every epoch in a new order. Raises InputError if one batch does not fill."""
    import grain  # here, for its only use: it is slow to import, and --help must not wait for it

    require_one_batch(rows, batch)
    order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()

    def read(step: int) -> dict[str, Column]:
        which = np.asarray([order[step * batch + i] for i in range(batch)])
        return {field: Column(rows, which, field) for field in FIELDS}

    return read


def sample(rows: Rows | Stream, count: int, seed: int, lower: str = "their number") -> dict[str, np.ndarray]:
    """`count` different rows, drawn by the seed. Raises InputError if there are not as many, with what the caller can
    lower."""
    require(
        len(rows) >= count,
        f"the calibration text is too short: {len(rows)} rows of {rows.length} tokens where {count} are asked for: "
        f"give more text, or lower {lower}",
    )
    return {field: np.asarray(column) for field, column in batches(rows, count, seed)(0).items()}
