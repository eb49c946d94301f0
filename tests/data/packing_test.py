import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.config import InputError
from efflm.data.packing import load_or_pack, pack

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=20), min_size=1, max_size=6)


@given(DOCUMENTS, st.integers(1, 9))
def test_every_token_is_a_target_once_in_order_within_its_document(documents, length):
    rows = pack(documents, separator=0, length=length)
    assert rows.inputs.shape[1] == length
    flat = {name: array.ravel() for name, array in rows[:].items()}
    for index, ids in enumerate(documents):
        mine = flat["segments"] == index + 1
        np.testing.assert_array_equal(flat["inputs"][mine], [0, *ids])
        np.testing.assert_array_equal(flat["targets"][mine], [*ids, 0])
    assert np.all(flat["targets"][flat["segments"] == 0] == 0)
    assert (flat["segments"] == 0).sum() < length


@given(DOCUMENTS, st.integers(1, 9))
def test_positions_count_from_the_start_of_each_stretch(documents, length):
    rows = pack(documents, separator=0, length=length)
    for segments, positions in zip(rows.segments, rows.positions):
        for t in range(length):
            starts = t == 0 or segments[t] != segments[t - 1]
            assert positions[t] == (0 if starts else positions[t - 1] + 1)


def test_stored_rows_are_read_and_not_made_again(tmp_path):
    rows = pack([[1, 2, 3]], separator=0, length=4)
    load_or_pack(tmp_path / "r.npy", lambda: rows)
    again = load_or_pack(tmp_path / "r.npy", lambda: 1 / 0)
    for name, array in rows[:].items():
        np.testing.assert_array_equal(again[:][name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["r.npy"]


def test_rows_that_the_disk_has_no_room_for_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    rows = pack([[1] * 500], 0, 10)
    with pytest.raises(InputError, match=r"1\.00 kB free, but this run needs about \d\.\d\d kB"):
        load_or_pack(tmp_path / "rows.npy", lambda: rows)
    assert list(tmp_path.iterdir()) == []
