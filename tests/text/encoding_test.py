"""Bytes are those of the text, whatever the tokenizer makes of it, and a long text has the tokens of the whole."""

import dataclasses
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from efflm.config import InputError
from efflm.data import dataset
from efflm.evaluate import quality, windows
from efflm.evaluate.windows import Scoring
from efflm.text import encoding
from efflm.text.tokenizer import SEPARATOR, Tokenizer, load
from tests import tiny
from tests.text.tokenizer_lines import lines
from tests.text.tokenizer_test import folder_of, sentencepiece_like

GOLDEN = Path(__file__).parent / "golden_tokenizers"
RIVER = "the river runs to the sea, café naïve über İstanbul 河流 "


def byte_level(normalizer=None, post_processor=None) -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    more = {"special_tokens": [SEPARATOR], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    core.train_from_iterator([RIVER], trainers.BpeTrainer(vocab_size=300, show_progress=False, **more))
    if normalizer:
        core.normalizer = normalizer
    if post_processor:
        core.post_processor = post_processor
    return Tokenizer(core)


def unknown() -> Tokenizer:
    """In SentencePiece's way, with neither the characters of RIVER that are not ASCII nor bytes to fall back on."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False, special_tokens=["<unk>", SEPARATOR])
    core.train_from_iterator(["the river runs to the sea"], trainer)
    return Tokenizer(core)


def golden(name, tmp_path_factory) -> Tokenizer:
    return load(folder_of(tmp_path_factory.mktemp(name), json.loads((GOLDEN / f"{name}.json").read_text())))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    fallback = load(folder_of(tmp_path_factory.mktemp("fallback"), sentencepiece_like()))
    return {
        "plain": byte_level(),
        "nfc": byte_level(normalizers.NFC()),
        "nfkd": byte_level(normalizers.NFKD()),
        "lower": byte_level(normalizers.Lowercase()),
        "stripped": byte_level(normalizers.Sequence([normalizers.Strip(), normalizers.StripAccents()])),
        "trimmed": byte_level(post_processor=processors.ByteLevel(trim_offsets=True)),
        "unknown": unknown(),
        "fallback": fallback,
        "byte_level": golden("byte_level", tmp_path_factory),
        "sentencepiece": golden("sentencepiece", tmp_path_factory),
    }


KNOWN = ["plain", "nfc", "nfkd", "lower", "stripped", "trimmed", "unknown", "fallback", "byte_level", "sentencepiece"]


def whole(found):
    """The ids and the bytes of all stretches."""
    ids, sizes = zip(*found, strict=True)
    return [i for each in ids for i in each], np.concatenate(sizes)


@pytest.mark.parametrize("name", KNOWN)
@given(text=st.text(min_size=1).map(lambda text: f"a{text}"))
def test_bytes_add_up_to_those_of_the_text(known, name, text):
    for form in (text, unicodedata.normalize("NFD", f"{RIVER}{text} a {SEPARATOR}")):
        ids, sizes = whole(known[name].sized([form]))
        assert ids == known[name].encode(form)
        assert sizes.sum() == len(form.encode())
        assert sizes.min() >= 0


@pytest.mark.parametrize("name", KNOWN)
def test_a_text_in_stretches_has_the_tokens_and_the_bytes_of_the_whole(known, name):
    text = "\n".join([*lines(80), RIVER, "", "", "    x  ", " \ty"])
    expected = known[name].encode(text)
    for size in (300, 347, 1000):
        stretches = [text[start : start + size] for start in range(0, len(text), size)]
        ids, sizes = whole(known[name].sized(stretches))
        assert ids == expected
        assert sizes.sum() == len(text.encode())
    apart = [token for part in stretches for token in known[name].encode(part)]
    assert apart != expected or name not in ("byte_level", "sentencepiece")  # what they would be without context


def test_bytes_are_those_up_to_the_end_of_each_token(known):
    of = lambda name, text: whole(known[name].sized([text]))[1].tolist()
    assert of("nfc", unicodedata.normalize("NFD", "x é")) == [1, 1, 3]
    assert of("unknown", "the 河流") == [4, 6]  # both characters are one unknown token, and no space comes before
    assert of("fallback", "hi é😀<code>") == [2, 1, 2, 4, 0, 0, 0, 6]
    assert of("plain", f"a{SEPARATOR}") == [1, 13]
    assert of("plain", "😀") == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["nfc", "unknown", "plain"])
def test_scores_divide_by_the_bytes_of_the_file(known, name, tmp_path):
    """Of a whole file, and of its first tokens alone."""
    text = unicodedata.normalize("NFD", RIVER * 6) + SEPARATOR
    (tmp_path / "text").write_text(text)
    tokens, model = known[name], tiny.model()
    read = dataset.to_score(str(tmp_path / "text"), "", {}, tokens, tmp_path)
    measured = lambda count: quality.measure(
        {"": model}, windows.blocks(read.sized(), 0, Scoring(tokens=count, window=32, stride=16)), model
    )[""]
    assert measured(0).bytes.tolist() == [len(text.encode())]
    ends = [end for _, end in tokens.core.encode(text).offsets]
    assert measured(40).bytes.tolist() == [len(text[: max(ends[:40])].encode())]
    assert measured(40).tokens.tolist() == [40]


def test_half_a_surrogate_pair_is_no_text(known):
    half, tokens = "ok \ud83d bad", known["plain"]
    chat = dataclasses.replace(tokens, template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    calls = {
        "the text": [
            lambda: tokens.encode(half),
            lambda: tokens.encode_batch(["a", half]),
            lambda: tokens.prompt(half),
        ],
        "messages": [lambda: chat.chat([{"role": "user", "content": half}])],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(InputError, match=rf"{name} has '\\ud83d' at character \d+, which is half of"):
                call()
    assert tokens.decode(tokens.encode("\U0001f600")) == "\U0001f600"


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=12),
)
def test_text_ends_before_the_first_stop_wherever_it_is_cut(text, stops, cuts):
    """The first that is complete, of several that are complete at once the longest."""
    real = [stop for stop in stops if stop]
    found = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in real if text[:end].endswith(stop)]
    up_to, shown, read = encoding.until(stops), "", 0
    for cut in cuts:
        new, ended = up_to(text[read : read + cut])
        shown, read = shown + new, min(read + cut, len(text))
        assert ended == any(end <= read for end, _ in found)
        if ended:
            break
        held = text[len(shown) : read]
        assert not held or any(stop.startswith(held) and stop != held for stop in real)
    else:
        new, ended = up_to(text[read:], final=True)
        shown += new
        assert ended == bool(found)
    assert shown == (text[: min(found)[1]] if found else text)
