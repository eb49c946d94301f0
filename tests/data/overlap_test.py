import numpy as np
import pytest

from efflm.data import overlap


def rows(tokens, segments=None):
    tokens = np.asarray(tokens)
    return {"inputs": tokens, "segments": np.ones_like(tokens) if segments is None else np.asarray(segments)}


def by_hand(calibration, documents, n=overlap.LENGTH):
    grams = lambda ids: [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    known = set()
    for tokens, segments in zip(calibration["inputs"], calibration["segments"]):
        for segment in set(segments) - {0}:
            known |= set(grams([int(t) for t, s in zip(tokens, segments) if s == segment]))
    wanted = [gram for document in documents for gram in grams(document)]
    return sum(gram in known for gram in wanted) / len(wanted)


def test_the_share_is_that_of_equal_sequences():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50000, (4, 60))
    segments = np.repeat([[1] * 25 + [2] * 25 + [0] * 10], 4, axis=0)
    calibration = rows(text, segments)
    documents = [text[0, :40].tolist(), text[1, 26:48].tolist(), rng.integers(0, 50000, 30).tolist(), [1, 2]]
    found = overlap.share(calibration, documents)
    assert found == pytest.approx(by_hand(calibration, documents))
    assert 0.1 < found < 0.9


def test_nothing_long_enough_is_no_overlap():
    assert overlap.share(rows(np.zeros((2, 20), int)), [[0] * 12]) == 0
    assert overlap.share(rows(np.zeros((2, 20), int)), [[0] * 13]) == 1
    assert overlap.share(rows(np.zeros((2, 5), int)), [[0] * 40]) == 0
