"""Which rows a step sees: a function of seed and step alone, so the state of the data is the global step."""

from collections.abc import Callable

import numpy as np

from efflm.config import require
from efflm.data.packing import Rows


def require_one_batch(rows: Rows, batch: int) -> None:
    require(
        len(rows) >= batch,
        f"the corpus is too small: {len(rows)} rows of {rows.inputs.shape[1]} tokens do not fill one batch of {batch}: "
        "give more text, or lower --train.batch or --train.length",
    )


def batches(rows: Rows, batch: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> its `batch` rows, every epoch in a new order. Raises InputError if one batch does not fill."""
    import grain  # here, for its only use: it is slow to import, and --help must not wait for it

    require_one_batch(rows, batch)
    order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()
    return lambda step: rows[np.asarray([order[step * batch + i] for i in range(batch)])]
