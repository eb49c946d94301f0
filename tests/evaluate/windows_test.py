"""Windows against their definition, and figures over them against float64."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.data import packing
from efflm.evaluate import quality
from efflm.evaluate.windows import Windows, cut
from efflm.model import LanguageModel, sharding
from tests import reference, tiny

SEPARATOR = 299


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 290, length).tolist() for length in lengths]


def by_definition(texts, windows):
    """{(document, place in it): how many tokens are before the token in the window that scores it}, token by token."""
    first, step = [(0, None)] if windows.bos else [], windows.stride or windows.window
    streams = [first + [(d, i) for i in range(len(text))] for d, text in enumerate(texts, 1)]
    if windows.joined:
        whole = list(first)
        for d, stream in enumerate(streams):
            whole += [(0, None)] * (d > 0) + stream[len(first) :]
        streams = [whole]
    out = {}
    for stream in streams:
        for place in range(1, len(stream)):
            start = 0
            while start + windows.window < place:  # the first window whose last target is this one or a later
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
)
def test_every_token_is_scored_once_after_the_tokens_it_should_see(lengths, window, stride, bos, joined):
    windows = Windows(window=window, stride=min(stride, window), bos=bos, joined=joined)
    texts = documents(*lengths)
    expected = by_definition(texts, windows)
    if not sum(max(0, length + bos - 1) for length in lengths) and not expected:
        return
    rows, found, places = cut(texts, SEPARATOR, windows), {}, dict.fromkeys(range(1, len(texts) + 1), 1 - bos)
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
    step = windows.stride or window
    assert all(seen >= min(window - step, place) for (_, place), seen in found.items())


def test_the_rows_of_one_document():
    rows = cut([[1, 2, 3, 4, 5, 6]], 9, Windows(window=4, stride=2))
    assert rows["inputs"].tolist() == [[9, 1, 2, 3], [2, 3, 4, 5]]
    assert rows["targets"].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert rows["documents"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3]] * 2
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Windows(window=8, joined=True))
    assert rows["inputs"].tolist() == [[9, 1, 2, 3, 9, 4, 9, 5]]
    assert rows["documents"].tolist() == [[1, 1, 1, 0, 2, 0, 3, 3]]
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Windows(window=8))  # short ones share a row
    assert rows["inputs"].tolist() == [[9, 1, 2], [9, 9, 5]]
    assert rows["segments"].tolist() == [[1, 1, 1], [1, 2, 2]]
    rows = cut([[1, 2, 3], [4], [5, 6]], 9, Windows(window=8, bos=False))
    assert rows["targets"].tolist() == [[2, 3], [6, 0]]
    assert rows["documents"].tolist() == [[1, 1], [3, 0]]


@pytest.mark.parametrize("joined", [False, True])
def test_figures_equal_float64(joined):
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    texts, windows = documents(5, 21, 9), Windows(window=8, stride=3, joined=joined)
    sizes = np.arange(300) % 4 + 1
    got = quality.measure({"": other}, cut(texts, SEPARATOR, windows), sizes, reference=model)[""]
    bits, kl, same, size = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    stream = [(0, SEPARATOR)] + [(1, i) for i in texts[0]]
    streams = [[(0, SEPARATOR)] + [(d, i) for i in text] for d, text in enumerate(texts, 1)]
    if joined:
        streams = [stream + streams[1] + streams[2]]
    scored = by_definition(texts, windows)
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
            size[document - 1] += sizes[token]
    for name, value in {"bits": bits, "kl": kl, "agreement": same, "bytes": size, "tokens": [5, 21, 9]}.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-4, err_msg=name)
    mean, error = quality.perplexity(got)
    nats, tokens = bits * np.log(2), np.array([5, 21, 9])
    np.testing.assert_allclose(mean, np.exp(nats.sum() / 35), rtol=1e-4)
    spread = np.sqrt(1.5 * np.sum((nats - nats.sum() / 35 * tokens) ** 2)) / 35
    np.testing.assert_allclose(error, mean * spread, rtol=1e-3)
    np.testing.assert_allclose(quality.divergence(got)[0], kl.sum() / 35, rtol=1e-4)


def test_windows_agree_with_packed_rows_where_the_protocols_do():
    """Documents cut before their closing separator, each within a row."""
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    texts = documents(8, 8, 8)
    packed = packing.pack(texts, SEPARATOR, 8, most=8)[:]
    rows = cut(texts, SEPARATOR, Windows(window=8))
    sizes = np.ones(300)
    by = [quality.measure({"": other}, each, sizes, reference=model)[""] for each in (packed, rows)]
    for field in dataclasses.fields(by[0]):
        np.testing.assert_allclose(getattr(by[0], field.name), getattr(by[1], field.name), rtol=1e-6)


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_a_model_on_a_mesh_scores_the_same(format):
    model = tiny.model()
    if format == "int8":
        model = LanguageModel(model.config, quantize(model.params, "int8"))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = model.replace(params=jax.device_put(model.params, sharding.shardings(model.params, mesh)))
    rows = cut(documents(20, 30, 7), SEPARATOR, Windows(window=16, stride=8))
    one, many = (quality.measure({"": each}, rows, np.ones(300), each, batch=3)[""] for each in (model, spread))
    np.testing.assert_allclose(many.bits, one.bits, rtol=1e-5)
    assert quality.divergence(many) == (0.0, 0.0)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="window is 0"):
        Windows(window=0)
    with pytest.raises(InputError, match="stride is 9"):
        Windows(window=8, stride=9)
    with pytest.raises(InputError, match="nothing to score"):
        cut([[]], SEPARATOR, Windows())
    small = tiny.model(dataclasses.replace(tiny.LLAMA, vocabulary=400))
    rows = cut(documents(5), SEPARATOR, Windows())
    with pytest.raises(InputError, match="vocabulary has 400 entries, the reference's 300"):
        quality.measure({"": small}, rows, np.ones(400), reference=tiny.model())


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (Windows(window=2048, stride=512), ["2,048 tokens, 512 apart", "at least 1,536", "by itself", "as BOS"]),
        (Windows(window=64, bos=False, joined=True), ["64 tokens, disjoint", "joined", "without BOS"]),
    ],
)
def test_the_protocol_says_what_it_is(windows, words):
    for word in words:
        assert word in str(windows)
