import sys
from types import SimpleNamespace

import numpy as np
import pytest

from efflm.config import InputError
from efflm.evaluate import lm_eval
from tests import tiny
from tests.evaluate.tasks_test import BOS, BYTES, likeliest, logits_of, plainly

MODEL = tiny.model(seed=3)


class Letters:
    """A tokenizer of bytes whose other ids are letters too, so that whatever a model writes is text."""

    bos, eos, stops, separator, digest, names = BOS, None, (), BOS, "letters", BYTES.names
    encode, prompt = staticmethod(BYTES.encode), staticmethod(BYTES.prompt)

    @staticmethod
    def stream():
        return lambda ids, final=False: "".join(chr(i) if i < 128 else "abcdefgh"[i % 8] for i in ids)


@pytest.fixture(scope="module")
def model():
    return lm_eval.Answering(MODEL, Letters())


def asked(*args):
    return [SimpleNamespace(args=each) for each in args]


# A text after which the likeliest token is a letter, and that letter.
LETTER = next(
    (text, chr(found)) for text in map(chr, range(32, 127)) if (found := likeliest(MODEL, [BOS, ord(text)], 1)[0]) < 128
)


def nats(context, end):
    p_MV = plainly([(context, [end])], logits_of(MODEL))
    return p_MV[np.arange(len(end)), end].sum(), p_MV.argmax(-1).tolist() == end


def test_log_likelihoods_are_those_of_whole_sequences(model):
    texts = [("The sky", " is"), ("The sky", " is blue"), ("", "Grass"), ("Grass ", "is"), ("x" * 70, " green")]
    found = model.loglikelihood(asked(*texts, (LETTER[0], LETTER[1])))
    ids = [
        ([BOS, *b"The sky"], b" is"),
        ([BOS, *b"The sky"], b" is blue"),
        ([BOS], b"Grass"),
        ([BOS, *b"Grass"], b" is"),
    ]
    ids += [([*b"x" * 59], b" green"), ([BOS, *LETTER[0].encode()], LETTER[1].encode())]  # 64 tokens, and the last one
    expected = [nats(context, [*end]) for context, end in ids]
    assert expected[-1][1]  # the likeliest letter
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    with pytest.raises(InputError, match=r"the continuation 'g+ has 65 tokens, but the model reads 64"):
        model.loglikelihood(asked(("Grass", "g" * 65)))
    with pytest.raises(InputError, match="the continuation '' adds no token"):
        model.loglikelihood(asked(("Grass", "")))


@pytest.mark.parametrize("length", [0, 5, 64, 150])
def test_whole_texts_are_read_in_windows_that_score_each_token_once(model, length):
    text = ("The sky is blue. " * 10)[:length]
    ids = [BOS, *BYTES.prompt(text)]  # as lm-eval has it: the first token is read before what the tokenizer puts there
    expected = sum(
        nats(ids[max(0, min(i + 64, len(ids)) - 65) : i], ids[i : i + 64])[0] for i in range(1, len(ids), 64)
    )
    np.testing.assert_allclose(model.loglikelihood_rolling(asked((text,))), [expected], rtol=1e-5)


def test_what_is_written_ends_before_a_stop_string(model):
    contexts = ["The sky", "Grass is", "The s", "a" * 70]
    whole = [Letters.stream()(likeliest(MODEL, [BOS, *text.encode()][-52:], 12)) for text in contexts]
    greedy = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    assert model.generate_until(asked(*[(text, greedy) for text in contexts])) == whole
    stop = whole[0][4:6]
    found = model.generate_until(asked(*[(text, greedy | {"until": [stop, whole[1][7]]}) for text in contexts]))
    cut = lambda text: text.partition(stop)[0].partition(whole[1][7])[0]
    assert found == list(map(cut, whole))
    with pytest.raises(InputError, match="asks to generate with penalty: known are do_sample, max_c"):
        model.generate_until(asked(("a", {"penalty": 2})))
    with pytest.raises(InputError, match="64 tokens are asked for, but the model reads 64"):
        model.generate_until(asked(("a", {"max_tokens": 64})))


def test_settings_of_tasks():
    settings = lm_eval._settings({"until": ["a", ""], "do_sample": True, "max_new_tokens": 3, "top_p": 0.9})
    assert settings[:2] == (3, ("a",))
    assert (settings[2].temperature, settings[2].top_p) == (1.0, 0.9)
    assert lm_eval._settings({})[:2] == (256, ())
    assert lm_eval._settings({"temperature": 0.5})[2].temperature == 0.5
    assert lm_eval._settings({"temperature": 0.5, "do_sample": False})[2].temperature == 0


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        lm_eval.adapted(MODEL, Letters())
