import dataclasses

import numpy as np
import pytest

from efflm.cli import progress
from efflm.config import InputError
from efflm.data import dataset, files


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
    for field, array in first.train[:].items():
        np.testing.assert_array_equal(array, second.train[:][field])
    ids = first.train.targets[first.train.segments == 1]
    assert first.tokenizer.decode(ids) == first.corpus.train[0][1]


def test_held_out_text_comes_as_tokens_again_and_again(folder):
    data = prepare(folder)
    for split, count in (("validation", 35), ("test", 70)):
        text = getattr(data, split)
        for _ in range(2):
            found = [data.tokenizer.decode(list(ids)) for ids in text]
            assert found == [document for _, document in getattr(data.corpus, split)]
        assert len(text) == len(text.sizes) == count
        assert sum(text.sizes) == sum(len(document.encode()) for document in found)
        assert text.name == f"{split} documents of {folder}"
    assert not text.unbroken


def test_a_long_document_is_tokenized_in_stretches(folder, monkeypatch):
    data = prepare(folder)
    whole = [list(ids) for ids in data.test]
    monkeypatch.setattr(files, "STRETCH", 64)
    seen, sized = [], data.tokenizer.sized
    text = dataclasses.replace(data.test, encode=lambda part: sized(seen.append(s) or s for s in part.stretches()))
    ids = next(iter(text))
    assert next(ids) == whole[0][0]
    assert len(seen) == 3  # the rest of the document has not been read
    assert [whole[0][0], *ids] == whole[0]
    assert max(len(each) for each in seen) <= 64


def test_what_is_scored_is_a_text_or_the_test_split(folder, tmp_path):
    data, cache = prepare(folder), tmp_path / "cache"
    score = lambda text, corpus, about: dataset.to_score(text, corpus, about, data.tokenizer, cache)
    assert len(score(str(folder), "", {})) == 700
    assert score("", str(folder), {}).name == score("", "", {"source": str(folder)}).name == data.test.name
    assert score("", "", {}).known == "Python's standard library"
    assert not score("", "", {"source": "stdlib"}).known


def test_a_tokenizer_that_is_too_large_is_refused(folder):
    tokens = prepare(folder).tokenizer
    with pytest.raises(InputError, match="has 270 entries, but the vocabulary is 269"):
        dataset.prepare(str(folder), folder.parent / "c", vocabulary=269, length=32, batch=2, tokenizer=tokens)


def test_too_little_text_for_a_batch_is_refused(folder):
    with pytest.raises(InputError, match="too small"):
        prepare(folder, batch=100_000)


def test_reading_and_tokenizing_show_how_far_they_are(folder, monkeypatch):
    titles = []
    shown = progress.shown
    monkeypatch.setattr(
        progress, "shown", lambda items, title, *rest: titles.append(title) or shown(items, title, *rest)
    )
    prepare(folder)
    assert titles[0] == f"reading {folder}"
    assert "tokenizing" in titles
    assert "training the tokenizer" in titles
