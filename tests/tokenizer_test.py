import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm import tokenizer
from efflm.config import InputError

TOKENIZER = tokenizer.train(["the cat sat on the mat\n" * 50, "def f(x):\n    return x\n" * 50], 300)


@given(st.text())
def test_text_comes_back_and_bytes_are_counted(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())
    assert TOKENIZER.separator not in ids or tokenizer.SEPARATOR in text


def test_training_is_deterministic_and_merges():
    again = tokenizer.train(["the cat sat on the mat\n" * 50, "def f(x):\n    return x\n" * 50], 300)
    assert again.digest == TOKENIZER.digest
    assert TOKENIZER.vocabulary <= 300
    assert len(TOKENIZER.encode("the cat sat")) < 8


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    assert tokenizer.load(tmp_path / "t.json").digest == TOKENIZER.digest
    with pytest.raises(InputError, match="no tokenizer at"):
        tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is not a tokenizer"):
        tokenizer.load(tmp_path / "t.json")
