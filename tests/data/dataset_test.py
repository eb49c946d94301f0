import numpy as np
import pytest

from efflm.config import InputError
from efflm.data import dataset


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i in range(700):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(rng.choice(["one", "two", "three", "four\n"], 150)))
    return tmp_path / "text"


def prepare(folder, batch=2):
    cache = folder.parent / "cache"
    return dataset.prepare(str(folder), cache, vocabulary=270, length=32, batch=batch)


def test_a_corpus_becomes_rows_and_the_second_time_finds_them(folder):
    first = prepare(folder)
    made = {path: path.stat().st_mtime_ns for path in (folder.parent / "cache").rglob("*") if path.is_file()}
    second = prepare(folder)
    assert made == {p: p.stat().st_mtime_ns for p in (folder.parent / "cache").rglob("*") if p.is_file()}
    assert first.tokenizer.digest == second.tokenizer.digest
    for name in ("train", "validation", "test"):
        for field, array in getattr(first, name)[:].items():
            np.testing.assert_array_equal(array, getattr(second, name)[:][field])
    ids = first.train.targets[first.train.segments == 1]
    assert first.tokenizer.decode(ids) == first.corpus.train[0][1]


def test_held_out_text_is_capped_and_the_protocol_says_so(folder):
    data = prepare(folder)
    assert len(data.corpus.test) == 70
    assert data.test.segments.max() == dataset.TEST_DOCUMENTS == 64
    assert np.bincount(data.test.segments.ravel())[1:].max() <= dataset.TEST_TOKENS
    assert "64 of 70 test documents" in data.protocol


def test_too_little_text_for_a_batch_is_refused(folder):
    with pytest.raises(InputError, match="too small"):
        prepare(folder, batch=100_000)
