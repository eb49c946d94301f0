"""Which packed rows a step trains on: a function of seed and step only, so the state of the data is the global step."""

from collections.abc import Callable

import numpy as np

from efflm.config import require
from efflm.data.packing import Rows, Stream


def require_one_batch(rows: Rows | Stream, batch: int, lower: str = "the batch or its length") -> None:
    """Raise InputError if the rows do not fill it. lower: what the caller can make smaller."""
    require(
        len(rows) >= batch,
        f"the corpus is too small: {len(rows)} rows of {rows.length} tokens do not fill one batch of {batch}: "
        f"give more text, or lower {lower}",
    )


def batches(rows: Rows | Stream, batch: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> its `batch` rows, every epoch in a new order. Raises InputError if one batch does not fill."""
    import grain  # here, for its only use: it is slow to import, and --help must not wait for it

    require_one_batch(rows, batch)
    order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()

    def read(step: int) -> dict[str, np.ndarray]:
        return rows[np.asarray([order[step * batch + i] for i in range(batch)])]

    return read


def sample(rows: Rows | Stream, count: int, seed: int, lower: str = "their number") -> dict[str, np.ndarray]:
    """`count` different rows, chosen by the seed. Raises InputError if there are not as many, with what the caller can
    lower."""
    require(
        len(rows) >= count,
        f"the calibration text is too short: {len(rows)} rows of {rows.length} tokens where {count} are asked for: "
        f"give more text, or lower {lower}",
    )
    return batches(rows, count, seed)(0)
