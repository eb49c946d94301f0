"""Windows against their definition, and figures over them against float64."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.evaluate import quality, windows
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel, placement
from efflm.parallel import meshes
from tests import reference, tiny

SEPARATOR = 299


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 290, length).tolist() for length in lengths]


def blocks(texts, separator, scoring, unbroken=False):
    """Of documents in which a token stands for 1 to 4 bytes."""
    sized = (((token, token % 4 + 1) for token in text) for text in texts)
    return windows.blocks(sized, separator, scoring, unbroken)


def cut(texts, separator, scoring):
    """All blocks as one."""
    parts = list(blocks(texts, separator, scoring))
    assert len({part["inputs"].shape for part in parts}) == 1
    return {name: np.concatenate([part[name] for part in parts]) for name in windows.FIELDS}


def by_definition(texts, scoring):
    """{(document, place in it): how many tokens are before the token in the window that scores it}, token by token."""
    first, step = [(0, None)] if scoring.bos else [], scoring.stride or scoring.window
    streams = [first + [(d, i) for i in range(len(text))] for d, text in enumerate(texts, 1)]
    if scoring.joined:
        whole = list(first)
        for d, stream in enumerate(streams):
            whole += [(0, None)] * (d > 0) + stream[len(first) :]
        streams = [whole]
    out = {}
    for stream in streams:
        for place in range(1, len(stream)):
            start = 0
            while start + scoring.window < place:  # the first window whose last target is this one or a later
                start += step
            if stream[place][0]:
                out[stream[place]] = place - start
    return out


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    window=st.integers(1, 20),
    stride=st.integers(0, 20),
    bos=st.booleans(),
    joined=st.booleans(),
    block=st.sampled_from([1, 24, 8192]),
)
def test_every_token_is_scored_once_after_the_tokens_it_should_see(lengths, window, stride, bos, joined, block):
    scoring = Scoring(window=window, stride=min(stride, window), bos=bos, joined=joined)
    texts = documents(*lengths)
    expected = by_definition(texts, scoring)
    if not sum(max(0, length + bos - 1) for length in lengths) and not expected:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "BLOCK", block)
        rows = cut(texts, SEPARATOR, scoring)
    found, places = {}, dict.fromkeys(range(1, len(texts) + 1), 1 - bos)
    if joined:
        places = dict.fromkeys(places, 0) | ({1: 1 - bos} if lengths[0] else {})
    for r, t in np.argwhere(rows["documents"] > 0):
        document = int(rows["documents"][r, t])
        found[document, places[document]] = int(rows["positions"][r, t]) + 1
        assert rows["targets"][r, t] == texts[document - 1][places[document]]
        places[document] += 1
    if joined and not bos:  # the stream's first token may be that of a later document, or a separator
        expected = {key: seen for key, seen in expected.items() if key in found}
        assert len(found) >= sum(lengths) - 1
    assert found == expected
    assert rows["inputs"].shape[1] <= window
    step = scoring.stride or window
    assert all(seen >= min(window - step, place) for (_, place), seen in found.items())


def test_the_rows_of_one_document():
    rows = cut([[1, 2, 3, 4, 5, 6]], 9, Scoring(window=4, stride=2))
    assert rows["inputs"].tolist() == [[9, 1, 2, 3], [2, 3, 4, 5]]
    assert rows["targets"].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert rows["documents"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3]] * 2
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Scoring(window=8, joined=True))
    assert rows["inputs"].tolist() == [[9, 1, 2, 3, 9, 4, 9, 5]]
    assert rows["documents"].tolist() == [[1, 1, 1, 0, 2, 0, 3, 3]]
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Scoring(window=8))  # short ones share a row
    assert rows["inputs"].tolist() == [[9, 1, 2, 9, 9, 5, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 2, 3, 3, 0, 0]]
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Scoring(window=8, bos=False))
    assert rows["targets"].tolist() == [[2, 3, 6, 0, 0, 0, 0, 0]]
    assert rows["documents"].tolist() == [[1, 1, 3, 0, 0, 0, 0, 0]]
    rows = cut([[1, 2, 3], [4], [5, 6, 7, 8]], 9, Scoring(window=8, documents=2, tokens=2))  # only so much of them
    assert rows["targets"].tolist() == [[1, 2], [4, 0]]


@pytest.mark.parametrize("joined", [False, True])
def test_figures_equal_float64(joined):
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    texts, scoring = documents(5, 21, 9), Scoring(window=8, stride=3, joined=joined)
    got = quality.measure({"": other}, blocks(texts, SEPARATOR, scoring), reference=model)[""]
    bits, kl, same, size = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    stream = [(0, SEPARATOR)] + [(1, i) for i in texts[0]]
    streams = [[(0, SEPARATOR)] + [(d, i) for i in text] for d, text in enumerate(texts, 1)]
    if joined:
        streams = [stream + streams[1] + streams[2]]
    scored = by_definition(texts, scoring)
    for stream in streams:
        counts = dict.fromkeys((1, 2, 3), 0)
        for place, (document, token) in enumerate(stream):
            if not document:
                continue
            seen = [i for _, i in stream[place - scored[document, counts[document]] : place]]
            counts[document] += 1
            logits = [reference.forward(m.config, m.params, seen)[-1] for m in (model, other)]
            log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in logits)
            bits[document - 1] -= log_q[token] / np.log(2)
            kl[document - 1] += np.sum(np.exp(log_p) * (log_p - log_q))
            same[document - 1] += log_p.argmax() == log_q.argmax()
            size[document - 1] += token % 4 + 1
    for name, value in {"bits": bits, "kl": kl, "agreement": same, "bytes": size, "tokens": [5, 21, 9]}.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-4, err_msg=name)
    mean, error = quality.perplexity(got)
    nats, tokens = bits * np.log(2), np.array([5, 21, 9])
    np.testing.assert_allclose(mean, np.exp(nats.sum() / 35), rtol=1e-4)
    spread = np.sqrt(1.5 * np.sum((nats - nats.sum() / 35 * tokens) ** 2)) / 35
    np.testing.assert_allclose(error, mean * spread, rtol=1e-3)
    np.testing.assert_allclose(quality.divergence(got)[0], kl.sum() / 35, rtol=1e-4)


def test_blocks_add_up_to_the_whole(monkeypatch):
    """One block or many, and what is kept of the reference, are all the same to the sums."""
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    texts, scoring = documents(5, 0, 21, 40, 1, 9), Scoring(window=8, stride=3)
    whole = quality.measure({"": other}, blocks(texts, SEPARATOR, scoring), model)[""]
    monkeypatch.setattr(windows, "BLOCK", 16)
    kept = {}
    parts = quality.measure({"": other}, blocks(texts, SEPARATOR, scoring), model, kept)[""]
    assert len(kept) > 3
    monkeypatch.setattr(quality, "KEPT", sum(x.nbytes for x in kept.values()))
    again = quality.measure({"": other}, blocks(texts, SEPARATOR, scoring), model, kept)[""]
    for field in dataclasses.fields(whole):
        one, many, third = (getattr(each, field.name) for each in (whole, parts, again))
        assert one.shape == (6,)
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5, err_msg=field.name)
        np.testing.assert_array_equal(third, many)
    monkeypatch.setattr(quality, "KEPT", 2 * kept[0].nbytes)
    few = {}
    quality.measure({"": other}, blocks(texts, SEPARATOR, scoring), model, few)
    assert sum(x.nbytes for x in few.values()) <= quality.KEPT  # bounded
    assert 0 < len(few) < len(kept)


class Counted:
    """A document that counts the tokens that are asked of it."""

    asked = 0

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            Counted.asked += 1
            yield index % 250


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("length", [3, 3000])
def test_memory_does_not_grow_with_the_text(joined, length, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 512)
    scoring = Scoring(window=64, stride=32, joined=joined, documents=0, tokens=0)

    def peak(tokens):
        Counted.asked = 0
        tracemalloc.start()
        for _ in blocks((Counted(length) for _ in range(tokens // length)), SEPARATOR, scoring):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert Counted.asked == tokens // length * length  # each token is read once
        return most

    peak(3000)  # what is imported or cached the first time
    assert peak(60_000) < 1.2 * peak(6000)


def test_sums_grow_in_linear_time():
    """Space for documents is doubled, never added one by one."""
    sums, copied = np.zeros((5, 0)), 0
    for count in range(1, 5000):
        before, sums = sums, quality._room_for(count, sums)
        copied += before.shape[1] * (sums is not before)
    assert copied < 2 * 5000


def test_only_the_first_tokens_of_a_document_are_read():
    Counted.asked = 0
    (block,) = blocks([Counted(10**9), Counted(10**9)], SEPARATOR, Scoring(window=16, documents=1, tokens=20))
    assert (block["documents"] > 0).sum() == 20
    assert Counted.asked <= 21


def test_parts_of_one_text_are_scored_without_separators():
    scoring = Scoring(window=4).within(64, unbroken=True)
    (block,) = blocks([[1, 2, 3], [4, 5, 6]], 9, scoring, unbroken=True)
    assert block["inputs"].tolist() == [[9, 1, 2, 3], [4, 5, 0, 0]]
    assert block["targets"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert block["documents"].tolist() == [[1, 1, 1, 2], [2, 2, 0, 0]]


def test_the_window_is_what_the_model_was_trained_on():
    assert Scoring().within(4096).window == 1024
    assert Scoring().within(512).window == 512
    assert Scoring().within(1024, trained=256).window == 256
    assert Scoring(window=600).within(1024, trained=256).window == 600
    with pytest.raises(InputError, match="window is 65, but the model's max_length is 64"):
        Scoring(window=65).within(64)
    whole = Scoring(documents=3).within(64, unbroken=True)
    assert (whole.documents, whole.tokens, whole.joined) == (0, 0, True)


def test_the_protocol_says_how_much_was_scored():
    sums = lambda count: quality.Quality(*(np.full(count, 7.0) for _ in range(5)))
    scoring = Scoring().within(64)
    said = windows.described(scoring, "test documents of X", 70, sums(2))
    assert "2 of 70 test documents of X, at most the first 512 tokens of each (14 tokens scored)" in said
    assert said.endswith("standard errors over documents")
    assert windows.described(scoring, "documents", 1, sums(1)).endswith("one document: no error bar")
    whole = windows.described(scoring.within(64, unbroken=True), "stretches", 2, sums(2), unbroken=True)
    assert "whole" in whole
    assert "as one text" in whole
    assert "separator, which" not in whole


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_a_model_on_a_mesh_scores_the_same(format):
    model = tiny.model()
    if format == "int8":
        model = LanguageModel(model.config, quantize(model.params, "int8"))
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    rows = list(blocks(documents(20, 30, 7), SEPARATOR, Scoring(window=16, stride=8)))
    one, many = (quality.measure({"": each}, rows, each)[""] for each in (model, spread))
    np.testing.assert_allclose(many.bits, one.bits, rtol=1e-5)
    assert quality.divergence(many) == (0.0, 0.0)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="window is -1"):
        Scoring(window=-1)
    with pytest.raises(InputError, match="stride is 9"):
        Scoring(window=8, stride=9)
    with pytest.raises(InputError, match="nothing to score"):
        cut([[]], SEPARATOR, Scoring(window=4))
    small = tiny.model(dataclasses.replace(tiny.LLAMA, vocabulary=400))
    rows = list(blocks(documents(5), SEPARATOR, Scoring(window=8)))
    with pytest.raises(InputError, match="vocabulary is 400, the reference's 300"):
        quality.measure({"": small}, rows, reference=tiny.model())


@pytest.mark.parametrize(
    ("scoring", "words"),
    [
        (Scoring(window=2048, stride=512), ["2,048 tokens, 512 apart", "at least 1,536", "by itself", "as BOS"]),
        (Scoring(window=64, bos=False, joined=True), ["64 tokens, disjoint", "joined", "without BOS"]),
    ],
)
def test_the_protocol_says_what_it_is(scoring, words):
    for word in words:
        assert word in str(scoring)
