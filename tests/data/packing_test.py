import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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
    load_or_pack(tmp_path / "r.npz", lambda: rows)
    again = load_or_pack(tmp_path / "r.npz", lambda: 1 / 0)
    for name, array in rows[:].items():
        np.testing.assert_array_equal(again[:][name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]
