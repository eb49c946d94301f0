"""Ids equal to transformers' on a thousand lines; tokenizer_golden.py asked it for them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from efflm.config import InputError
from efflm.formats import gguf_tokenizer
from efflm.text import tokenizer
from tests.text.tokenizer_lines import lines

GOLDEN = Path(__file__).parent / "golden_tokenizers"
DIGESTS = json.loads((GOLDEN / "digests.json").read_text())
HERE = Path("here.gguf")


def require_same(loaded, golden):
    batch = loaded.encode_batch(lines())
    found = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6] for ids in batch]
    expected = [golden[start : start + 6] for start in range(0, len(golden), 6)]
    differing = [line for line, a, b in zip(lines(), found, expected, strict=True) if a != b]
    assert not differing, f"{len(differing)} lines, among them {differing[0]!r}"
    assert batch[::100] == [loaded.encode(line) for line in lines()[::100]]


def vocabulary(name):
    """Tokens in the order of their ids, and merges, of a tokenizer.json."""
    model = json.loads((GOLDEN / f"{name}.json").read_text())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def byte_level_metadata(**more):
    tokens, merges = vocabulary("byte_level")
    metadata = {"model": "gpt2", "tokens": tokens, "merges": merges, "bos_token_id": 1, "eos_token_id": 2}
    metadata |= {"token_type": np.where(np.arange(len(tokens)) < 3, gguf_tokenizer.CONTROL, 1), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def sentencepiece_metadata(**more):
    tokens, _ = vocabulary("sentencepiece")
    known = {"<unk>": 2, "<s>": 3, "</s>": 3, "<code>": 4}
    kinds = [known.get(token, 6 if token.startswith("<0x") else 1) for token in tokens]
    scores = np.array(json.loads((GOLDEN / "scores.json").read_text()), np.float32)
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": np.array(kinds), **more}
    metadata |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_tokenizer_json_gives_the_ids_it_gives_transformers(name):
    require_same(tokenizer.load(GOLDEN / f"{name}.json"), DIGESTS[name])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_a_byte_level_vocabulary_in_a_gguf_file(pre):
    loaded = gguf_tokenizer.from_metadata(byte_level_metadata(pre=pre), HERE)
    require_same(loaded, DIGESTS[f"gguf_{pre}"])
    assert (loaded.bos, loaded.eos, loaded.stops, loaded.separator) == (1, 2, (0, 2), 1 if pre == "llama-bpe" else 0)
    assert bool(loaded.before) == (pre == "llama-bpe")
    begins = [1] if pre == "llama-bpe" else []
    assert loaded.core.encode("a").ids == [
        *begins,
        *loaded.encode("a"),
    ]  # as transformers reads the file it is saved as


def test_a_sentencepiece_vocabulary_in_a_gguf_file():
    loaded = gguf_tokenizer.from_metadata(sentencepiece_metadata(), HERE)
    require_same(loaded, DIGESTS["sentencepiece"])
    assert loaded.before
    for line in lines()[::10]:
        ids = loaded.encode(line)
        if not {"<s>", "</s>", "<unk>"} & {loaded.core.id_to_token(index) for index in ids}:
            assert loaded.decode(ids) == line.replace("▁", " ")
    plain = gguf_tokenizer.from_metadata(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False), HERE)
    assert plain.core.encode("a").tokens == ["a"]
    assert plain.prompt(" a") == plain.encode(" a") == loaded.encode("a")


def test_llama_3_takes_a_word_that_is_a_token_whole_whatever_the_merges():
    tokens, _ = vocabulary("byte_level")
    unreachable = {"tokens": [*tokens, "Ġzzz"], "token_type": None}
    encoded = lambda pre: gguf_tokenizer.from_metadata(byte_level_metadata(pre=pre, **unreachable), HERE).encode(" zzz")
    assert encoded("llama-bpe") == [len(tokens)]
    assert len(encoded("qwen2")) > 1


def test_merges_go_by_score_and_then_by_the_longer_left_half():
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    scores = np.array([0, -1, -2, -3, -5, -4, -6], np.float32)
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": np.array([2, 1, 1, 1, 1, 1, 1])}
    core = gguf_tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, HERE).core
    assert json.loads(core.to_str())["model"]["merges"] == [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]


def test_ggml_splits_a_vocabulary_of_unknown_origin_at_punctuation_and_every_three_digits():
    for pre in ("default", None):
        core = gguf_tokenizer.from_metadata(byte_level_metadata(pre=pre), HERE).core
        words = [word for word, _ in core.pre_tokenizer.pre_tokenize_str("don't +1234567 x")]
        assert words == ["don", "'", "t", "Ġ", "+", "123", "456", "7", "Ġx"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "holds no tokenizer"),
        (byte_level_metadata(model="bert"), "kind 'bert', but read are 'gpt2' and 'llama'"),
        (byte_level_metadata(pre="deepseek-llm"), "'deepseek-llm' .tokenizer.ggml.pre., but known are default, gpt-2"),
        (byte_level_metadata(pre=3), "splits text in the way 3"),
        (byte_level_metadata(tokens=["a", "b", "a"]), "tokens 0 and 2 are both 'a'"),
        (byte_level_metadata(tokens=np.arange(3)), "no list of strings tokenizer.ggml.tokens"),
        (byte_level_metadata(merges=None), "no list of strings tokenizer.ggml.merges"),
        (byte_level_metadata(merges=["a b c"]), "'a b c' merges no two tokens"),
        (byte_level_metadata(merges=["qqq zzz"]), "'qqq zzz' merges no two tokens"),
        (byte_level_metadata(add_bos_token=1), "add_bos_token is 1"),
        (byte_level_metadata(add_space_prefix=True), "add_space_prefix is True, but texts of byte-level tokenizers"),
        (sentencepiece_metadata(add_space_prefix=1), "add_space_prefix is 1, but must be a bool"),
        (sentencepiece_metadata(pre="llama-bpe"), "pre is 'llama-bpe', but SentencePiece does not split"),
        (byte_level_metadata(eot_token_id=2**63), "eot_token_id is 9223372036854775808, but there are 900 tokens"),
        (sentencepiece_metadata(scores=np.zeros(3)), "must be a list of 900 numbers"),
        (sentencepiece_metadata(scores=np.full(900, np.nan)), "not all finite"),
        (sentencepiece_metadata(tokens=[*vocabulary("sentencepiece")[0][:-1], "x" * 300]), "899 has 300 characters"),
    ],
)
def test_what_is_wrong_is_named(metadata, message):
    with pytest.raises(InputError, match=message) as caught:
        gguf_tokenizer.from_metadata(metadata, HERE)
    assert str(caught.value).startswith("here.gguf")
