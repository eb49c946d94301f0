"""What llama.cpp itself makes of the files: logits, tokens, greedy text, and the values of every type."""

import ctypes
import dataclasses
import functools
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import efflm
from efflm import ops, trees
from efflm.config import InputError
from efflm.formats import gguf_check, gguf_export, gguf_file, gguf_model, gguf_vocabulary
from efflm.infer.generate import generate
from tests import gguf_files, reference, tiny
from tests.formats.gguf_export_test import CONFIGS, LLAMA, UNEVEN, as_read, vocabularies, words  # noqa: F401
from tests.text.tokenizer_golden_test import lines

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp")
FLOAT = 1e-4  # what logits may differ by
ROUNDED = 1e-2  # where activations are rounded in both: a few are so near the middle of two codes that they differ
WITHIN = gguf_export.within_window
RECIPES = ["w8a16", "w4a16", "w3a16", "quantize[bits=4,group=32,symmetric=false]", "magnitude24,w8a8", "bfloat16"]


@functools.cache
def compressed(recipe):
    model = tiny.model(LLAMA)
    return efflm.compress(model, recipe) if recipe else model


def own_logits(model, ids):
    return np.asarray(gguf_check.logits(model, np.array([ids], np.int32)))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_floats_are_llama_cpps(tmp_path, words, name, capsys):  # noqa: F811
    model = tiny.model(CONFIGS[name])
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf")
    assert "the likeliest token is the same for 100%" in capsys.readouterr().err
    ids, found = gguf_check.run_llama_cpp(file, 150)
    assert ids == words.encode(gguf_check.TEXT)[:150]
    np.testing.assert_allclose(found, own_logits(model, ids), rtol=0, atol=FLOAT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_compressed_weights_as_floats_are_llama_cpps(tmp_path, words, recipe):  # noqa: F811
    model = compressed(recipe)
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf", kind="F32")
    ids, found = gguf_check.run_llama_cpp(file, 150)
    np.testing.assert_allclose(found, own_logits(model, ids), rtol=0, atol=FLOAT)


def in_blocks(x):
    """Activations as llama.cpp rounds them before it multiplies matrices of most types: in blocks of 32 to 8 bits, with
    a scale of float16. And what it takes for the sum of each block less what is the sum of these."""
    blocks = np.float32(x).reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.round(blocks / np.where(scale > 0, scale, 1))
    found = codes * np.float64(np.float16(scale))
    sums = np.float64(np.float16(scale[:, 0] * codes.sum(axis=1, dtype=np.float32)))
    return found.reshape(x.shape), sums - found.sum(axis=1)


def rounding_linear(params, x):
    x, more = in_blocks(x)
    return x @ params["kernel"] + (more @ params["least"] if "least" in params else 0)


@pytest.mark.parametrize("recipe", RECIPES[:-1])
def test_logits_of_codes_are_those_of_a_reference_that_rounds_activations_alike(tmp_path, words, recipe, monkeypatch):  # noqa: F811
    written = compressed(recipe)
    file = efflm.save(tmp_path / "a.gguf", written, words, format="gguf")
    model, _ = efflm.load(file)
    weights = dict(trees.flatten(model.params))
    for path, weight in trees.flatten(written.params):
        if isinstance(weight, ops.QArray) and weight.zeros is not None:  # of Q4_1, which multiplies sums of activations
            least = -(np.float32(weight.zeros) + 8) * np.float32(np.float16(weight.scale))
            weights[path.replace("kernel", "least")] = np.float16(least)
    monkeypatch.setattr(reference, "_linear", rounding_linear)
    ids, found = gguf_check.run_llama_cpp(file, 40)
    states = reference.streams(model.config, trees.unflatten(weights), ids)[-1]
    norm = {"scale": np.float64(model.params["final_norm"]["scale"])}
    head = np.float64(model.params["embedding"]).T
    wanted = np.stack([in_blocks(reference._norm(model.config, norm, x))[0] @ head for x in states])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDED)
    assert np.median(np.abs(found - wanted)) < FLOAT / 10
    assert np.abs(found - own_logits(model, ids)).max() > 100 * FLOAT  # that is, it does round


@pytest.mark.parametrize("recipe", ["", "w8a16", "w4a16"])
def test_sixty_four_greedy_tokens_are_ours(tmp_path, words, recipe):  # noqa: F811
    model = compressed(recipe)
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf", kind="F32")
    prompt = words.encode("the cat sat on")
    assert greedy(file, prompt, 64) == generate(model, [prompt], 64)[0]


def greedy(file, prompt, count):
    """Token by token, with llama.cpp's cache."""
    float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    engine = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, **float32)
    engine.eval(prompt)
    found = []
    for _ in range(count):
        found.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(found[-1:])
    engine.close()
    return found


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "smollm", "scores", "no prefix", "byte_level"])
def test_tokens_of_a_thousand_lines_are_llama_cpps(tmp_path, name):
    own = vocabularies()[name]
    model = tiny.model(dataclasses.replace(LLAMA, vocabulary=910))
    file = efflm.save(tmp_path / "a.gguf", model, own, format="gguf")
    engine = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    read = lambda line: engine.tokenize(line.encode(), add_bos=True, special=True)
    text = [unicodedata.normalize("NFC", line) if name == "qwen2" else line for line in lines()]  # it leaves that out
    differ = [line for line in text if read(line) != own.prompt(line)]
    assert not differ, f"{len(differ)} lines, among them {differ[:3]!r}"


def uncapped(config):
    """The config without its windows, but of its length."""
    return dataclasses.replace(WITHIN(config), max_length=config.max_length)


def test_llama_cpp_finds_what_reading_back_cannot(tmp_path, words, monkeypatch):  # noqa: F811
    """Mistakes that the reader here makes too."""
    model = tiny.model(LLAMA)
    with monkeypatch.context() as patched:
        patched.setattr(gguf_export, "paired", lambda rows, heads: rows)
        patched.setattr(gguf_model, "halved", lambda rows, heads: rows)
        for recipe in ("", "w8a16"):
            with pytest.raises(InputError, match=r"llama\.cpp's logits differ from the model's by"):
                efflm.save(tmp_path / "a.gguf", compressed(recipe), words, format="gguf")
    with monkeypatch.context() as patched:
        layout = gguf_model.INNER | {"attn_k_norm": "self_attn.q_norm", "attn_q_norm": "self_attn.k_norm"}
        patched.setattr(gguf_model, "INNER", layout)
        with pytest.raises(InputError, match=r"llama\.cpp's logits differ from the model's by"):
            efflm.save(tmp_path / "a.gguf", tiny.model(CONFIGS["qwen3"]), words, format="gguf")
    with monkeypatch.context() as patched:
        patched.setattr(gguf_export, "within_window", uncapped)
        patched.setattr(gguf_check, "read_back", lambda *given: "")
        with pytest.raises(InputError, match=r"llama\.cpp's logits differ from the model's by"):
            efflm.save(tmp_path / "a.gguf", tiny.model(CONFIGS["windows"]), words, format="gguf")
    with monkeypatch.context() as patched:
        to_metadata = gguf_vocabulary.to_metadata
        wrong = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5}
        patched.setattr(gguf_vocabulary, "to_metadata", lambda *given: to_metadata(*given) | wrong)
        patched.setattr(gguf_check, "read_back", lambda *given: "")
        with pytest.raises(InputError, match=r"llama.cpp reads the tokens \[5, "):
            efflm.save(tmp_path / "a.gguf", model, words, format="gguf")
    with monkeypatch.context() as patched:
        patched.setattr(gguf_export, "_family", lambda config: ("llama", "llama"))
        patched.setattr(gguf_check, "read_back", lambda *given: "")
        uneven = tiny.model(dataclasses.replace(LLAMA, blocks=UNEVEN))
        with pytest.raises(InputError, match=r"llama\.cpp does not load the file that was written"):
            efflm.save(tmp_path / "a.gguf", uneven, words, format="gguf")
    assert not list(tmp_path.iterdir())


# ggml's functions that give the floats of a row.
C_NAMES = {name: f"dequantize_row_{name.lower().replace('_k', '_K')}" for name in gguf_file.SIZES}


@pytest.mark.parametrize("kind", [name for name in gguf_file.SIZES if name not in gguf_file.FLOATS])
def test_the_values_of_every_type_are_ggmls(tmp_path, rng, kind):
    from tests.formats.gguf_file_test import stored

    raw = gguf_files.random_blocks(rng, kind, 12)
    header = stored(tmp_path / "a.gguf", w=(kind, raw.reshape(4, -1)))
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    wanted = np.empty(12 * gguf_file.SIZES[kind][0], np.float32)
    pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)
    getattr(library, C_NAMES[kind])(pointer(np.ascontiguousarray(raw)), pointer(wanted), ctypes.c_int64(wanted.size))
    found = gguf_file.read_tensor(header, "w").reshape(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    assert wanted.std() > 0
