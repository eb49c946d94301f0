"""Streamed text is the text that is written in one go, in whole characters."""

import gc

import jax
import pytest

import efflm
from efflm.config import InputError
from efflm.infer import generate, speculative, streaming
from efflm.text import tokenizer
from tests import tiny
from tests.infer.speculative_test import half_right, varied


@pytest.fixture(scope="module")
def words():
    return tokenizer.train(["the cat sat on the mat, the dog did not ünd 😀 "] * 20, 300)


@pytest.mark.parametrize("family", tiny.and_combinations(["llama", "gpt2", "gemma"], ["llama"]))
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "top_k": 60, "seed": 4}], ids=["greedy", "drawn"])
def test_the_pieces_are_the_text_that_is_written_in_one_go(words, family, drafted, how):
    model = varied(tiny.CONFIGS[family])
    how = {"max_tokens": 24, "draft": half_right(model) if drafted else None, "ahead": 3} | how
    whole = efflm.generate(model, words, "the cat", **how)
    pieces = list(efflm.stream(model, words, "the cat", **how))
    assert "".join(pieces) == whole
    assert 2 < len(pieces) <= 25
    for stop in (whole[6:9], whole[:1], "never"):
        cut = "".join(efflm.stream(model, words, "the cat", stop=stop, **how))
        assert cut == efflm.generate(model, words, "the cat", stop=stop, **how) == whole.split(stop)[0]


def test_characters_of_several_tokens_come_whole(words, monkeypatch):
    ids = [words.byte_ids[byte] for byte in "aü😀!".encode() + b"\xf0\x9f"]
    monkeypatch.setattr(generate, "stream", lambda *_: iter([[[i]] for i in ids]))
    got = list(streaming.pieces(tiny.model(), words, [1], len(ids)))
    assert [piece.text for piece in got if piece.text] == ["a", "ü", "😀", "!", "\ufffd"]
    assert [piece.ids for piece in got] == [*([token] for token in ids), []]
    assert [piece.end for piece in got if piece.end] == ["length"]


def test_the_end_says_why(words):
    model = varied(tiny.CONFIGS["llama"])

    def ends(words, **how):
        got = list(streaming.pieces(model, words, [5, 9], 12, **how))
        assert [piece.end for piece in got[:-1]] == [""] * (len(got) - 1)
        return [token for piece in got for token in piece.ids], got[-1].end

    (ids,) = generate.generate(model, [[5, 9]], 12)
    assert ends(words) == (ids, "length")
    assert ends(words, stops=["", words.stream()(ids, final=True)[-1]])[1] == "stop"
    stopping = tokenizer.Tokenizer(words.core, words.names, extra_stops=(ids[6],))
    assert ends(stopping) == (ids[: ids.index(ids[6]) + 1], "stop")
    assert ends(stopping, draft=half_right(model), ahead=3) == ends(stopping)


@pytest.mark.parametrize("drafted", [False, True])
def test_closing_ends_the_work_and_frees_the_cache(words, monkeypatch, drafted):
    model, calls = tiny.model(), []
    for module in (generate, speculative):
        decode = module.decode
        spy = lambda *given, decode=decode, **more: calls.append(1) or decode(*given, **more)
        monkeypatch.setattr(module, "decode", spy)
    stream = lambda: efflm.stream(model, words, "the cat", max_tokens=40, draft=model if drafted else None, ahead=1)
    list(stream())
    assert len(calls) > 10
    gc.collect()
    before, calls[:] = len(jax.live_arrays()), []
    texts = stream()
    assert not calls  # nothing is computed before it is asked for
    next(texts), next(texts)
    assert 0 < len(calls) < 4
    assert len(jax.live_arrays()) > before
    seen = len(calls)
    texts.close()
    assert len(calls) == seen
    assert len(jax.live_arrays()) == before


def test_what_is_wrong_is_told_before_the_first_piece(words):
    model = tiny.model()
    for message, wrong in {
        "max_length is 64": {"max_tokens": 64},
        "top_p is 0": {"top_p": 0},
        "prompt is a list": {"prompt": ["a"]},
        "prompt is 3": {"prompt": 3},
    }.items():
        with pytest.raises(InputError, match=message):
            efflm.stream(model, words, **{"prompt": "the cat", **wrong})
