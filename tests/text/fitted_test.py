"""Tokenizers and models whose vocabularies have different sizes: padded ones are one, added tokens are no obstacle."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efflm
from efflm import ops
from efflm.compress.distill import Distill
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.evaluate import quality, windows
from efflm.infer import generate, speculative
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel
from efflm.parallel import meshes
from efflm.text import fitted, tokenizer
from tests import reference, tiny
from tests.text.tokenizer_test import added, folder_of, sentencepiece_like

TOKENS = 270


def padded(model, size, unused=()):
    """The model with so many entries, of which only the first TOKENS have a token: the others are junk."""
    rng = np.random.default_rng(size)
    w = np.asarray(model.params["embedding"])[:TOKENS]
    junk = 3 * rng.standard_normal((size - TOKENS, w.shape[1])).astype(np.float32)
    config = dataclasses.replace(model.config, vocabulary=size, unused=(*unused, (TOKENS, size)))
    return LanguageModel(config, {**model.params, "embedding": jnp.concatenate([w, junk])})


@pytest.fixture(scope="module")
def model():
    return padded(tiny.model(), 300)


@pytest.fixture(scope="module")
def other():
    return padded(tiny.model(seed=1), 288)


def test_logits_of_ids_without_a_token():
    logits = jnp.arange(8.0)[None]
    assert ops.possible(logits, ()) is logits
    np.testing.assert_array_equal(ops.possible(logits, ((6, 8),)), logits[:, :6])
    np.testing.assert_array_equal(ops.possible(logits, ((2, 4), (7, 8))), [[0, 1, -np.inf, -np.inf, 4, 5, 6]])
    np.testing.assert_array_equal(ops.possible(logits, ((0, 1),), -5.0), [[-5, 1, 2, 3, 4, 5, 6, 7]])


def test_ids_without_a_token_are_never_written(model, other):
    holes = padded(tiny.model(), 300, unused=((3, 90), (100, 200)))
    prompts = [[1, 2, 95]] * 4
    for temperature, filters in ((100.0, {}), (100.0, {"top_k": 200, "min_p": 1e-9}), (0.0, {})):
        how = Sampling(temperature=temperature, **filters)
        written = {i for ids in generate.generate(holes, prompts, 40, how) for i in ids}
        drafted, _ = speculative.generate(holes, holes, prompts, 40, how)
        written |= {i for ids in drafted for i in ids}
        assert not [i for i in written if 3 <= i < 90 or 100 <= i < 200 or i >= TOKENS]
    assert (
        max(max(ids) for ids in speculative.generate(model, other, prompts, 40, Sampling(temperature=9.0))[0]) < TOKENS
    )


def test_a_draft_may_be_padded_to_another_size(model):
    draft = padded(model, 288)
    got, told = speculative.generate(model, draft, [[5, 6, 7], [9]], 20, ahead=3)
    assert got == generate.generate(model, [[5, 6, 7], [9]], 20)
    assert told.acceptance == 1.0
    unknown = draft.replace(config=dataclasses.replace(draft.config, unused=()))
    with pytest.raises(InputError, match="the draft's vocabulary is 288, the model's 270, without padding"):
        speculative.generate(model, unknown, [[5]], 4)


def test_divergence_and_agreement_are_over_tokens(model, other):
    ids = [[int(i) for i in row] for row in np.random.default_rng(0).integers(0, TOKENS, (2, 12))]
    sized = [[(i, 1) for i in row] for row in ids]
    rows = list(windows.blocks(sized, 0, windows.Scoring(tokens=0, window=16)))
    got = quality.measure({"": other}, rows, model)[""]
    for d, row in enumerate(ids):
        p, q = (reference.forward(m.config, m.params, [0, *row[:-1]]) for m in (model, other))
        log_p, log_q = (x[:, :TOKENS] - np.log(np.exp(x[:, :TOKENS]).sum(-1, keepdims=True)) for x in (p, q))
        np.testing.assert_allclose(got.kl[d], (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-3)
        assert got.agreement[d] == (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        whole = q - np.log(np.exp(q).sum(-1, keepdims=True))  # bits are the model's own, as everybody counts them
        np.testing.assert_allclose(got.bits[d], -whole[np.arange(12), row].sum() / np.log(2), rtol=1e-3)
    same = quality.measure({"": padded(model, 288)}, rows, model)[""]
    assert quality.divergence(same)[0] == pytest.approx(0, abs=1e-6)
    assert quality.agreement(same)[0] == 1
    with pytest.raises(InputError, match="vocabulary is 270, the reference's 300"):
        quality.measure({"": other}, rows, tiny.model())


@pytest.mark.parametrize("cache", ["", "full", "sampled"])
def test_a_teacher_may_be_padded_to_another_size(cache, model, other, tmp_path):
    """And a student that is the teacher but for the padding has nothing to learn."""
    batch = {name: x % 260 if name in ("inputs", "targets") else x for name, x in tiny.batch(model.config).items()}
    step = Distill(steps=1, weight=1.0, cache=cache, entries=50)
    told = {}
    for name, teacher in {"same": padded(model, 288), "other": other}.items():
        file = tmp_path / f"{name}.jsonl"
        context = Context(
            batches=lambda step: batch, teacher=teacher, mesh=meshes.make_mesh(), metrics=file,
            cache=tmp_path / name,
        )  # fmt: skip
        step(model, context)
        told[name] = json.loads(file.read_text().splitlines()[0])["divergence"]
    if cache != "sampled":  # of which the divergence is from the tokens drawn
        assert told["same"] == pytest.approx(0, abs=2e-3)
    assert told["other"] > told["same"] + 0.01
    with pytest.raises(InputError, match="the teacher's vocabulary is 300, the student's 270"):
        step(model, dataclasses.replace(context, teacher=tiny.model()))


def test_the_ids_that_no_token_has(tmp_path):
    described = sentencepiece_like()
    del described["model"]["vocab"]["é"], described["added_tokens"][-1]  # ids 262 and 265
    loaded = tokenizer.load(folder_of(tmp_path, described))
    assert fitted.unused(loaded, 265) == ((262, 263),)
    assert fitted.unused(loaded, 300) == ((262, 263), (265, 300))
    (tmp_path / "whole").mkdir()
    assert fitted.unused(tokenizer.load(folder_of(tmp_path / "whole", sentencepiece_like())), 266) == ()


def test_tokens_that_were_added_beyond_the_model_are_read_as_text(tmp_path, capsys):
    described = sentencepiece_like()
    plain = tokenizer.load(folder_of(tmp_path, described))
    described["added_tokens"] += [added(266, "[PAD]"), added(267, "<bos>")]
    names = {"pad_token": "[PAD]", "bos_token": "<bos>", "add_bos_token": True}
    tokens = tokenizer.load(folder_of(tmp_path, described, tokenizer_config=names))
    assert (tokens.vocabulary, tokens.encode("hi[PAD]")) == (268, [264, 266])
    short = fitted.to_vocabulary(tokens, 266, "a model")
    assert capsys.readouterr().err.count("warning: a model: the bos_token '<bos>' has id 267") == 1
    assert (short.vocabulary, short.bos, short.digest) == (266, None, tokens.digest)
    assert short.encode("hi") == short.prompt("hi") == [264]
    assert not capsys.readouterr().err
    for _ in range(2):
        assert short.encode("hi[PAD]") == short.encode_batch(["hi[PAD]"])[0] == plain.encode("hi[PAD]")
    assert [int(sizes.sum()) for _, sizes in short.sized(["hi[PAD]"])] == [7]
    assert capsys.readouterr().err.count("the text has '[PAD]', which was added to the tokenizer as id 266") == 1
    assert short.decode(short.encode("hi[PAD]")) == "hi[PAD]"
    (tmp_path / "saved").mkdir()
    short.save(tmp_path / "saved")
    assert tokenizer.load(tmp_path / "saved").digest == tokens.digest  # nothing of it is lost
    assert fitted.to_vocabulary(short, 300, "a model").vocabulary == 268
    with pytest.raises(InputError, match="a model: the tokenizer has 268 tokens, more than the model's 260"):
        fitted.to_vocabulary(tokens, 260, "a model")


def test_a_loaded_model_knows_which_ids_have_tokens(tmp_path, capsys):
    words = tokenizer.train(["the river runs to the sea"], 265)
    efflm.save(tmp_path / "model", tiny.model(), words)
    model, tokens = efflm.load(tmp_path / "model")
    assert model.config.unused == ((tokens.vocabulary, 300),)
    (tmp_path / "text").write_text("the river runs\n" * 90)
    pair = {"loaded": model, "made here": tiny.model()}
    first, second = efflm.measure(pair, tokens, tmp_path / "text", speed=False, documents=2)
    assert second.kl_to_original == pytest.approx(0, abs=1e-5)
    assert first.bits_per_byte == second.bits_per_byte
    assert efflm.generate(model, tokens, "the", draft=tiny.model(), max_tokens=4)
    text = efflm.generate(model, tokens, ["the"] * 3, max_tokens=40, temperature=100.0)
    assert all(text)
    words.core.add_tokens(["<more>"] * 1)
    words.core.add_tokens([f"<more{i}>" for i in range(60)])  # now beyond the model's 300
    words = fitted.to_vocabulary(tokenizer.Tokenizer(words.core, words.names), 300, "a model")
    efflm.save(tmp_path / "added", tiny.model(), words)
    model, tokens = efflm.load(tmp_path / "added")
    assert (tokens.vocabulary, model.config.unused) == (300, ())
    assert not capsys.readouterr().err
    assert jax.tree.leaves(model.params)
    efflm.generate(model, tokens, "<more59>", max_tokens=2)
    assert "the text has '<more59>'" in capsys.readouterr().err
