import numpy as np
import pytest

from efflm.config import InputError
from efflm.data.loader import batches
from efflm.data.packing import Rows

ROWS = Rows(*(np.arange(12, dtype=np.int32)[:, None] for _ in range(4)))


def ids(step, seed=0):
    return np.asarray(batches(ROWS, 4, seed)(step)["inputs"]).ravel().tolist()


def test_rows_are_a_function_of_seed_and_step():
    source = batches(ROWS, 4, 0)
    source(7)
    assert np.asarray(source(2)["inputs"]).ravel().tolist() == ids(2)
    assert ids(2, seed=1) != ids(2, seed=0)


def test_each_epoch_sees_every_row_once_in_a_new_order():
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in ids(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_less_than_a_batch_is_refused():
    with pytest.raises(InputError, match="12 rows of 1 tokens do not fill one batch of 13"):
        batches(ROWS, 13, 0)
