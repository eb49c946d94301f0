"""Models written as GGUF files: the numbers in them, what reads them back, what is refused, and what llama.cpp says."""

import dataclasses
import errno
import json
import os

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import efflm
from efflm import ops, trees
from efflm.config import InputError
from efflm.config.model import BlockConfig, LinearScaling, ModelConfig, RopeScaling
from efflm.formats import (
    gguf_blocks,
    gguf_check,
    gguf_export,
    gguf_file,
    gguf_model,
    gguf_tokenizer,
    gguf_vocabulary,
)
from efflm.ops import Format
from efflm.ops.lowrank import LowRank
from efflm.text import tokenizer
from tests import tiny
from tests.text.tokenizer_golden_test import GOLDEN, HERE, byte_level_metadata, lines, sentencepiece_metadata

LAYER = BlockConfig(heads=4, kv_heads=2, head_dim=16, mlp_dim=96)
LLAMA = ModelConfig(vocabulary=320, width=64, max_length=200, blocks=(LAYER,) * 2)
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)
UNEVEN = (LAYER, dataclasses.replace(LAYER, heads=2, kv_heads=1, mlp_dim=32), dataclasses.replace(LAYER, mlp_dim=64))
CONFIGS = {
    "llama": LLAMA,
    "untied": dataclasses.replace(LLAMA, tied=False, rope_base=5e5),
    "llama31": dataclasses.replace(LLAMA, rope_scaling=LLAMA31, norm_epsilon=1e-6),
    "linear": dataclasses.replace(LLAMA, rope_scaling=LinearScaling(factor=4.0)),
    "windows": dataclasses.replace(LLAMA, blocks=(dataclasses.replace(LAYER, window=150),) * 2),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, blocks=(dataclasses.replace(LAYER, head_dim=32),) * 2),
    "uneven": dataclasses.replace(LLAMA, blocks=UNEVEN),
}
WEIGHTS = {
    "w8": {"bits": 8}, "w8g64": {"bits": 8, "group": 64}, "w7z": {"bits": 7, "symmetric": False}, "w5": {"bits": 5},
    "w5g32z": {"bits": 5, "group": 32, "symmetric": False}, "w4": {"bits": 4}, "w4g32": {"bits": 4, "group": 32},
    "w3": {"bits": 3}, "w3g96": {"bits": 3, "group": 96}, "w3g32z": {"bits": 3, "group": 32, "symmetric": False},
    "w2": {"bits": 2}, "w2z": {"bits": 2, "symmetric": False}, "w2g32z": {"bits": 2, "group": 32, "symmetric": False},
    "w4s": {"bits": 4, "group": 32, "scale_dtype": "float32"},
    "w4b": {"bits": 4, "group": 32, "super_block": 256},
    "w4z": {"bits": 4, "symmetric": False}, "w4g64z": {"bits": 4, "group": 64, "symmetric": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def words():
    """A tokenizer of fewer tokens than the models here have."""
    return tokenizer.train(["the cat sat on the mat. " * 50, "naïve 12 def f(x): return"], 300)


def in_halves(weight):
    """The weight with the scales that a GGUF file has."""
    weight = ops.qarray.in_full(weight)
    return weight.replace(scale=weight.scale.astype(jnp.float16))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("inputs", [96, 512])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_librarys_values_of_our_blocks_are_ours_bit_for_bit(rng, name, masked, inputs, axis):
    w = rng.normal(size=(40, inputs)).astype(np.float32)
    weight = ops.quantize_array(jnp.asarray(w.T if axis == -2 else w), axis, Format(**WEIGHTS[name]))
    if masked:
        kept = jnp.asarray(rng.random(weight.shape) < 0.5)
        weight = ops.apply_masks({"w": weight}, {"w": kept})["w"]
    kind = gguf_blocks.kind_of(weight, axis == -2, masked)
    blocks = gguf_blocks.blocks_of("w", weight, kind, axis == -2, exact=True)
    assert blocks.shape == (40, gguf_file.New("w", (40, inputs), kind, None).row_bytes)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    wanted = np.asarray(ops.dequantize(in_halves(weight)))
    wanted = wanted.T if axis == -2 else wanted
    if kind in ("Q4_1", "Q5_1"):  # which add a float16
        scale = np.abs(np.asarray(weight.scale, np.float32)).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2**weight.bits * scale * 2**-11)
    else:
        np.testing.assert_array_equal(found, wanted)
    if masked:
        assert not found[~np.asarray(kept.T if axis == -2 else kept)].any()
    assert np.abs(found).max() > 1


def test_each_format_gets_the_smallest_type_that_holds_it():
    def kind(inputs, masked=False, **format):
        weight = ops.quantize_array(jnp.ones((inputs, 4)), -2, Format(**format))
        return gguf_blocks.kind_of(weight, True, masked)

    bits = range(8, 1, -1)
    eight = ["Q8_0"] * 3
    assert [kind(512, bits=each) for each in bits] == [*eight, "Q5_0", "Q4_0", "Q3_K", "Q2_K"]
    assert [kind(96, bits=each) for each in bits] == [*eight, "Q5_0", "Q4_0", "Q4_0", "Q4_0"]
    points = [kind(512, bits=each, group=32, symmetric=False) for each in bits]
    assert points == [None, "Q8_0", "Q8_0", "Q5_1", "Q4_1", "Q4_0", "Q4_0"]
    assert kind(512, bits=5, group=32, symmetric=False, masked=True) == "Q8_0"
    assert kind(512, bits=4, group=256, symmetric=False) == "Q4_K"
    assert kind(512, bits=4, group=32, symmetric=False, masked=True) == "Q5_0"
    assert kind(512, bits=4, group=48) is None
    assert kind(48, bits=8) is None
    of_rows = ops.quantize_array(jnp.ones((64, 64)), -1)  # contracted along what would be rows in the file
    assert gguf_blocks.kind_of(of_rows, True, False) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_are_as_they_were(tmp_path, words, dtype):
    model = efflm.model.in_dtype(tiny.model(CONFIGS["untied"]), dtype) if dtype else None
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf")
    kinds = {tensor.kind for tensor in gguf_file.read_header(file).tensors.values() if len(tensor.shape) > 1}
    assert kinds == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    again, _ = efflm.load(file)
    for (path, found), (_, wanted) in zip(trees.flatten(again.params), trees.flatten(model.params), strict=True):
        np.testing.assert_array_equal(found, np.asarray(wanted, np.float32), err_msg=path)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["", "w8a16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_read_back_as_it_was(tmp_path, words, name, recipe, capsys):
    model = tiny.model(CONFIGS[name])
    model = efflm.compress(model, recipe) if recipe else model
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf", check=False)
    again, theirs = efflm.load(file)
    assert dataclasses.replace(again.config, unused=()) == gguf_export.within_window(model.config)
    text = gguf_check.TEXT
    assert theirs.encode(text) == words.encode(text)
    tokens = tiny.tokens(model.config, 2, 40)
    np.testing.assert_allclose(tiny.logits(again, tokens), tiny.logits(model, tokens), rtol=0, atol=2e-5)
    said = capsys.readouterr().err
    assert "every number of the file" in said
    assert ("the context ends at 150 tokens" in said) == (name == "windows")
    header = gguf_file.read_header(file)
    start = min(tensor.start for tensor in header.tensors.values())
    assert file.stat().st_size - start == sum(-(-tensor.size // 32) * 32 for tensor in header.tensors.values())


def test_llamas_rows_are_in_the_converters_order(rng):
    from tests.gguf_files import interleaved

    rows = rng.normal(size=(8 * 6, 5))
    np.testing.assert_array_equal(gguf_export.paired(rows, 8), interleaved(rows, 8))
    np.testing.assert_array_equal(gguf_model.halved(interleaved(rows, 8), 8), rows)


def test_what_the_file_has_not_is_said(tmp_path, words, capsys):
    model = efflm.compress(tiny.model(LLAMA), "magnitude24,w8a8")
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf", check=False)
    said = capsys.readouterr().err
    assert "activations of 8 bits are not in GGUF files" in said
    assert "pruned weights are stored as zeros" in said
    described = gguf_file.read_header(file).metadata["general.description"]
    assert "written by efflm; magnitude@2:4, w8a8" in described or "magnitude" in described
    assert "pruned weights" in described


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_what_has_no_type_is_refused_or_rounded_to_one_that_is_asked_for(tmp_path, words, capsys, kind):
    model = efflm.compress(tiny.model(LLAMA), "quantize[bits=8,symmetric=false]")
    with pytest.raises(
        InputError, match=r"key/kernel \(8 bits, with zero points, 64 inputs\) is of no type.*set kind to F16"
    ):
        efflm.save(tmp_path / "a.gguf", model, words, format="gguf")
    assert not list(tmp_path.iterdir())
    file = efflm.save(tmp_path / "a.gguf", model, words, format="gguf", kind=kind, check=False)
    assert (
        f"{14 + (kind != 'Q8_0')} matrices are written as {kind}, which is not what they were"
        in capsys.readouterr().err
    )
    kinds = {tensor.kind for tensor in gguf_file.read_header(file).tensors.values() if len(tensor.shape) > 1}
    assert kinds == {kind}
    again, _ = efflm.load(file)
    error = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 250, "Q4_0": 2**-3}[kind]
    for (path, found), (_, wanted) in zip(trees.flatten(again.params), trees.flatten(model.params), strict=True):
        wanted = np.asarray(ops.dequantize(wanted))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=error * np.abs(wanted).max(), err_msg=path)


def adapted(model):
    """The model with an adapter beside one matrix."""
    pair = {"a": jnp.ones((64, 2)), "b": jnp.ones((2, 64))}
    one = lambda path, w: LowRank(w, **pair) if path == "block_0/attention/query/kernel" else w
    return model.replace(params=trees.map_with_path(one, model.params))


def refused(words):
    """(model, how it is saved, what the error says)."""
    llama = tiny.model(LLAMA)
    like = lambda **fields: tiny.model(dataclasses.replace(LLAMA, **fields))
    narrow = like(blocks=(dataclasses.replace(LAYER, mlp_dim=80),) * 2)
    other = dataclasses.replace(LLAMA31, factor=8.0, original_max_length=4096)
    return {
        "no suffix": (llama, {"name": "a"}, "must be a name that ends in .gguf"),
        "another kind": (llama, {"kind": "Q2_K"}, "kind is 'Q2_K', but must be one of F32, F16"),
        "gpt2": (tiny.model(tiny.GPT2), {}, "of the family gpt2, but GGUF files are written of llama, qwen2"),
        "gpt_neox": (tiny.model(tiny.CONFIGS["neox"]), {}, "of the family gpt_neox"),
        "layers of qwen2": (like(qkv_bias=True, blocks=UNEVEN), {}, "qwen2 and its layers differ in size"),
        "heads of qwen2": (like(qkv_bias=True, blocks=UNEVEN[1:2]), {}, "2 heads of 16 are not the width 64"),
        "rotary": (like(rope_scaling=other), {}, "of llama are not written with RopeScaling"),
        "rotary of qwen3": (like(rope_scaling=LLAMA31, qk_norm=True), {}, "of qwen3 are not written with RopeScaling"),
        "rows": (efflm.compress(narrow, "w8a16"), {}, r"down/kernel \(8 bits, 80 inputs\) is of no type"),
        "adapters": (adapted(llama), {}, r"query/kernel \(LowRank\) is of no type"),
        "rows again": (narrow, {"kind": "Q8_0"}, "has rows of 80, but Q8_0 has blocks of 32: set kind to F16"),
        "vocabulary": (like(vocabulary=200), {}, "has 287 entries, but the model a vocabulary of 200"),
    }  # fmt: skip


def test_what_cannot_be_written_is_refused_by_name(tmp_path, words):
    for case, (model, how, message) in refused(words).items():
        path = tmp_path / how.pop("name", "a.gguf")
        with pytest.raises(InputError, match=message):
            efflm.save(path, model, words, format="gguf", **how)
        assert not list(tmp_path.iterdir()), case


def test_nothing_is_written_over_and_a_full_disk_leaves_nothing(tmp_path, words, monkeypatch):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"a\.gguf exists already"):
        efflm.save(file, tiny.model(LLAMA), words, format="gguf")
    file = file.replace(tmp_path / "b.gguf.md")
    with pytest.raises(InputError, match=r"b\.gguf\.md exists already"):
        efflm.save(tmp_path / "b.gguf", tiny.model(LLAMA), words, format="gguf")
    assert file.read_bytes() == b"mine"
    with pytest.raises(InputError, match="kind is 'F16', but that is for the format gguf"):
        efflm.save(tmp_path / "b", tiny.model(LLAMA), words, kind="F16")
    write, calls = gguf.GGUFWriter.write_tensor_data, []

    def full(writer, tensor):
        calls.append(tensor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        efflm.save(tmp_path / "new" / "b.gguf", tiny.model(LLAMA), words, format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["b.gguf.md"]


def broken(monkeypatch, how):
    """The writer with one mistake."""
    if how == "rows":
        monkeypatch.setattr(gguf_export, "paired", lambda rows, heads: rows)
    if how == "scale":
        layout = gguf_blocks._LAYOUTS["Q8_0"]
        wrong = lambda codes, scale, zeros: layout(codes, (scale * np.float16(1.01)).astype(np.float16), zeros)
        monkeypatch.setitem(gguf_blocks._LAYOUTS, "Q8_0", wrong)
    metadata = gguf_vocabulary.to_metadata
    changes = {"bos": {"tokenizer.ggml.bos_token_id": 7}, "no bos": {"tokenizer.ggml.add_bos_token": False}}
    changes |= {"base": {"llama.rope.freq_base": 5000.0}}
    changes |= {"epsilon": {"llama.attention.layer_norm_rms_epsilon": 1e-3}}
    if how in changes:
        to_metadata = lambda *given, **named: metadata(*given, **named) | changes[how]
        monkeypatch.setattr(gguf_vocabulary, "to_metadata", to_metadata)


@pytest.mark.parametrize("how", ["rows", "scale", "bos", "no bos", "base", "epsilon"])
def test_a_file_that_is_not_the_model_is_not_left_behind(tmp_path, words, monkeypatch, how):
    model = efflm.compress(tiny.model(LLAMA), "w8a16").with_about({"source": "stdlib"})
    broken(monkeypatch, how)
    with pytest.raises(InputError, match=r"is not in the file as in the model|other tokens|the file says of the model"):
        efflm.save(tmp_path / "a.gguf", model, words, format="gguf", check=False)
    assert not list(tmp_path.iterdir())


# --- tokenizers ------------------------------------------------------------------------------------------------------


def as_read(metadata):
    """Lists of numbers are arrays in what is read."""
    plain = lambda value: value if not isinstance(value, list) or isinstance(value[0], str) else np.array(value)
    return {key: plain(value) for key, value in metadata.items()}


def vocabularies():
    names = ("gpt-2", "llama-bpe", "qwen2", "smollm")
    made = {pre: gguf_tokenizer.from_metadata(byte_level_metadata(pre=pre), HERE) for pre in names}
    made["scores"] = gguf_tokenizer.from_metadata(sentencepiece_metadata(), HERE)
    made["no prefix"] = gguf_tokenizer.from_metadata(sentencepiece_metadata(add_space_prefix=False), HERE)
    return made | {name: tokenizer.load(GOLDEN / f"{name}.json") for name in ("byte_level", "sentencepiece")}


def test_a_tokenizer_comes_back_from_its_metadata():
    for name, words in vocabularies().items():
        again = gguf_tokenizer.from_metadata(as_read(gguf_vocabulary.to_metadata(words, 910, words.before)), HERE)
        assert again.encode_batch(lines()) == words.encode_batch(lines()), name
        assert again.ids_digest == words.ids_digest
        assert (again.before, again.after, again.bos, again.eos) == (words.before, words.after, words.bos, words.eos)


def test_a_model_that_was_trained_here_begins_its_texts_with_the_separator(words):
    metadata = gguf_vocabulary.to_metadata(words, 320, (words.separator,))
    again = gguf_tokenizer.from_metadata(as_read(metadata), HERE)
    assert again.prompt("the cat") == [words.separator, *words.encode("the cat")]
    assert metadata["tokenizer.ggml.tokens"][words.vocabulary :][:1] == [f"[PAD{words.vocabulary}]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "in a way that has no name"),
        ({"normalizer": {"type": "Lowercase"}}, "in a way that has no name"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            "in a way that has no name",
        ),
        ({"model": {"ignore_merges": True}}, "in a way that has no name"),
        ({"added_tokens": [{"lstrip": True}]}, "has lstrip, which a GGUF file cannot say"),
    ],
)
def test_a_tokenizer_that_gguf_has_no_words_for_is_refused(change, message):
    described = json.loads((GOLDEN / "byte_level.json").read_text())
    for key, value in change.items():
        if key == "model":
            value = described[key] | value
        elif key == "added_tokens":
            value = [described[key][0] | value[0], *described[key][1:]]
        described[key] = value
    words = tokenizer.Tokenizer(tokenizer.from_description(described, "x"))
    with pytest.raises(InputError, match=message):
        gguf_vocabulary.to_metadata(words, 900, ())


def test_merges_in_an_order_that_no_scores_give_are_refused():
    described = json.loads((GOLDEN / "sentencepiece.json").read_text())
    merges = described["model"]["merges"]
    gone = described | {"model": described["model"] | {"merges": merges[:-3]}}
    words = tokenizer.Tokenizer(tokenizer.from_description(gone, "x"))
    with pytest.raises(InputError, match="in a way that has no name"):
        gguf_vocabulary.to_metadata(words, 900, ())
