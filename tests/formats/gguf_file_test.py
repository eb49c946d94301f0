import dataclasses
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.config import InputError
from efflm.formats import gguf_file as files
from efflm.formats import gguf_model, gguf_tokenizer, sources
from efflm.formats.tensors import Tensors
from efflm.formats.translate import to_model
from efflm.infer.generate import forward
from efflm.text import fitted
from tests import gguf_files

KINDS = {name: elements for name, elements, _ in files.KINDS.values()}


def stored(path, **tensors):
    """A file with nothing but tensors: name -> (kind, raw bytes [rows, bytes of a row])."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files.read_header(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_has_the_values_of_its_format(tmp_path, rng, kind, monkeypatch):
    rows, blocks = 5, 3 if KINDS[kind] > 1 else 40
    raw = gguf_files.random_blocks(rng, kind, rows * blocks)
    header = stored(tmp_path / "a.gguf", w=(kind, raw.reshape(rows, -1)))
    if kind in gguf_files.POINTS:
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    else:
        expected = np.array([[gguf_files.value(kind, block, e) for e in range(KINDS[kind])] for block in raw])
    expected = expected.reshape(rows, -1)
    values = files.read_tensor(header, "w")
    assert (values.dtype, values.shape) == (np.float32, (rows, blocks * KINDS[kind]))
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert expected.std() > 0
    monkeypatch.setattr(files, "CHUNK", 2 * blocks * KINDS[kind])  # two rows at a time, and one left over
    np.testing.assert_array_equal(files.read_tensor(header, "w"), values)


@pytest.mark.parametrize("name", ["Q9_9", "I8"])  # unknown to the library, and known but nothing that it dequantizes
def test_a_type_that_the_library_does_not_know_yet_is_one_line(tmp_path, name):
    header = stored(tmp_path / "a.gguf", w=("F32", np.zeros((2, 8), np.uint8)))
    tensor = dataclasses.replace(header.tensors["w"], kind=name)
    with pytest.raises(InputError, match=rf"'w' stored as {name}, which is newer than the gguf library here: update"):
        files.read_tensor(dataclasses.replace(header, tensors={"w": tensor}), "w")


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.005), ("Q5_1", 0.04), ("Q5_0", 0.07), ("Q4_1", 0.08)])
def test_what_the_library_quantizes_comes_back_rounded(tmp_path, rng, kind, error):
    w = rng.uniform(-1, 1, (6, 64)).astype(np.float32)
    raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(files.read_tensor(stored(tmp_path / "a.gguf", w=(kind, raw)), "w"), w, atol=error)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True)]
)
def test_a_model_comes_back_under_hugging_face_names(tmp_path, rng, architecture, tied):
    weights = gguf_files.weights(rng, architecture, tied)
    header = files.read_header(gguf_files.write(tmp_path / "a.gguf", weights, architecture))
    config, names = gguf_model.config_of(header), gguf_model.names_of(header)
    assert set(names) == set(weights)
    for name, w in weights.items():
        np.testing.assert_array_equal(gguf_model.read(header, names, config, name), w, err_msg=name)
    assert config == {
        "model_type": architecture,
        "vocab_size": len(gguf_files.TOKENS),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": pytest.approx(1e-6),
        "rope_theta": 20000.0,
        "tie_word_embeddings": tied,
        "attention_bias": architecture == "qwen2",
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_is_loaded_as_the_same_weights_from_elsewhere(tmp_path, rng, architecture):
    weights = gguf_files.weights(rng, architecture, tied=False)
    path = gguf_files.write(tmp_path / "a.gguf", weights, architecture)
    model, tokens = gguf_model.load(path)
    source = Tensors({name: w.shape for name, w in weights.items()}, weights.__getitem__)
    expected = to_model(gguf_model.config_of(files.read_header(path)), source)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    ids = tokens.encode("the thin hen")
    assert tokens.core.encode("the thin hen").tokens == ["t", "he", "Ġt", "h", "in", "Ġ", "he", "n"]
    assert np.isfinite(forward(model, jnp.asarray([ids]))[0]).all()
    low, _ = gguf_model.load(path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}


OF_GEMMA = {
    "vocab_size": len(gguf_files.TOKENS), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 20000.0, "query_pre_attn_scalar": 16,
}  # fmt: skip
GEMMA = {
    "gemma2": OF_GEMMA | {"model_type": "gemma2", "sliding_window": 16, "final_logit_softcapping": 20.0},
    "gemma3": OF_GEMMA
    | {"model_type": "gemma3_text", "sliding_window": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
MORE_OF_GEMMA = {
    "gemma2": {"final_logit_softcapping": 20.0},
    "gemma3": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}


@pytest.mark.parametrize("architecture", GEMMA)
def test_gemma_is_what_hugging_face_has_of_it(tmp_path, rng, architecture):
    weights = gguf_files.weights(rng, architecture, layers=6, head=16)
    metadata = MORE_OF_GEMMA[architecture] | {"attention.key_length": 16, "attention.value_length": 16}
    path = gguf_files.write(tmp_path / "a.gguf", weights, architecture, metadata=metadata)
    model, _ = gguf_model.load(path)
    expected = to_model(GEMMA[architecture], Tensors({name: w.shape for name, w in weights.items()}, weights.get))
    assert dataclasses.replace(model.config, unused=()) == expected.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), model.params, expected.params)
    assert [block.window for block in model.config.blocks] == (
        [16, 0] * 3 if architecture == "gemma2" else [16] * 5 + [0]
    )


def test_what_gemma_files_may_say_beside(tmp_path, rng):
    def read(architecture="gemma3", **metadata):
        path = gguf_files.write(
            tmp_path / "a.gguf", gguf_files.weights(rng, architecture, layers=6), architecture, metadata=metadata
        )
        return gguf_model.config_of(files.read_header(path))

    kinds = {True: "sliding_attention", False: "full_attention"}
    for pattern in (2, [True, False] * 3):
        found = read(**{"attention.sliding_window_pattern": pattern})
        assert found["layer_types"] == [kinds[True], kinds[False]] * 3
    assert read(**{"rope.freq_base_swa": 500.0})["rope_local_base_freq"] == 500
    largest = {"block_count": 26, "attention.key_length": 16, "attention.value_length": 16}
    assert read(**largest)["query_pre_attn_scalar"] == 16
    assert read(**(largest | {"block_count": 62}))["query_pre_attn_scalar"] == 32
    with pytest.raises(InputError, match=r"gemma3\.attn_logit_softcapping is 50\.0, which is not supported"):
        read(attn_logit_softcapping=50.0)
    with pytest.raises(InputError, match="layer_types is"):
        to_model(read(**{"attention.sliding_window_pattern": [True]}), Tensors(dict.fromkeys("abcdef", (1,)), None))


def test_more_tokens_than_the_model_embeds_are_refused(tmp_path, rng):
    weights = gguf_files.weights(rng)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]
    with pytest.raises(InputError, match=rf"has {len(gguf_files.TOKENS)} tokens, but embeds only"):
        gguf_model.load(gguf_files.write(tmp_path / "a.gguf", weights))


def test_rotary_scaling_of_llama_3_is_recognized_by_its_divisors(tmp_path, rng):
    # Llama 3.1's rule, one frequency at a time; its wavelengths are in positions.
    divisors = []
    for frequency in 500000.0 ** (-np.arange(0, 32, 2) / 32):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else between)
    divisors = np.array(divisors, np.float32)
    assert len(set(divisors)) > 2
    weights = gguf_files.weights(rng)
    base = {"rope.freq_base": 500000.0}
    read = lambda factors, **more: gguf_model.config_of(
        files.read_header(
            gguf_files.write(tmp_path / "a.gguf", weights, metadata=base | more, extra={"rope_freqs.weight": factors})
        )
    )
    assert read(divisors)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_scaling" not in read(np.ones(16, np.float32))
    with pytest.raises(InputError, match="in another way than Llama 3's"):
        read(divisors**2)
    with pytest.raises(InputError, match="must have 16"):
        read(divisors[:8])


def test_linear_scaling_and_yarn_are_read_and_what_they_do_not_say_is_as_in_llama_cpp(tmp_path, rng):
    def read(**metadata):
        path = gguf_files.write(tmp_path / "a.gguf", gguf_files.weights(rng), metadata=metadata)
        return gguf_model.config_of(files.read_header(path)).get("rope_scaling")

    factor = {"rope.scaling.factor": 4.0}
    assert read(**factor) == read(**factor, **{"rope.scaling.type": "linear"}) == {"rope_type": "linear", "factor": 4.0}
    assert read(**factor, **{"rope.scaling.type": "none"}) is None
    yarn = factor | {"rope.scaling.type": "yarn"}
    absent = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read(**yarn) == absent | {"beta_fast": 32.0, "beta_slow": 1.0}
    more = {"original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    found = read(**yarn, **{f"rope.scaling.{name}": value for name, value in more.items()})
    assert found == absent | {"original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0}


def test_keys_that_change_nothing_are_passed_over(tmp_path, rng):
    weights = gguf_files.weights(rng)
    plain = gguf_model.config_of(files.read_header(gguf_files.write(tmp_path / "a.gguf", weights)))
    scales = {"logit_scale": 1.0, "attention.scale": 32**-0.5, "final_logit_softcapping": 0.0, "residual_scale": 0.0}
    rope = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 64}
    counts = {"expert_count": 0, "expert_used_count": 0, "vocab_size": len(gguf_files.TOKENS), "pooling_type": 0}
    names = {
        "general.name": "x",
        "general.sampling.top_k": 4,
        "tokenizer.ggml.fim_pre_token_id": 3,
        "general.type": "model",
    }
    more = scales | rope | counts | names | {"attention.sliding_window": 0}
    path = gguf_files.write(tmp_path / "b.gguf", weights, metadata=more)
    assert gguf_model.config_of(files.read_header(path)) == plain


def test_a_window_is_passed_on(tmp_path, rng):
    path = gguf_files.write(tmp_path / "a.gguf", gguf_files.weights(rng), metadata={"attention.sliding_window": 64})
    config = gguf_model.config_of(files.read_header(path))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma', but read are llama, deci, qwen2, qwen3, gemma2"),
        ({"block_count": 2**31 - 1}, "claims 2147483647 layers"),
        ({"block_count": 0}, "block_count is 0"),
        ({"embedding_length": None}, "does not say llama.embedding_length"),
        ({"embedding_length": "256"}, "embedding_length is '256', but must be one positive int"),
        ({"rope.freq_base": float("nan")}, "freq_base is nan"),
        ({"rope.dimension_count": 16}, "rope.dimension_count is 16, but must be the head's size 32"),
        ({"attention.head_count_kv": [4, 2]}, "must be one positive int"),
        ({"rope.scaling.type": "longrope"}, "scales rotary positions by 'longrope'"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one part of 3"),
        ({"rope.scaling.factor": -4.0}, r"llama\.rope\.scaling\.factor is -4\.0, but must be one positive float"),
        ({"rope.scaling.attn_factor": 1.5}, r"rope\.scaling\.attn_factor is 1\.5, which is not supported"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, r"rope\.scaling\.yarn_log_multiplier is 0\.1"),
        ({"rope.dimension_sections": [1, 2]}, r"rope\.dimension_sections is"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ({"attention.scale": 0.5}, r"attention\.scale is 0\.5"),
        ({"attention.temperature_scale": 0.1}, r"attention\.temperature_scale"),
        ({"attention.sliding_window_pattern": 2}, "sliding_window_pattern is 2"),
        ({"logit_scale": 0.0625}, r"logit_scale is 0\.0625"),
        ({"residual_scale": 0.22}, "residual_scale"),
        ({"embedding_scale": 12.0}, "embedding_scale is 12"),
        ({"expert_used_count": 2}, "expert_used_count is 2"),
        ({"attention.causal": 0}, r"attention\.causal is 0"),
        ({"pooling_type": 1}, "pooling_type is 1"),
        ({"vocab_size": 7}, "vocab_size is 7"),
        ({"general.type": "adapter"}, r"general\.type is 'adapter'"),
        ({"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
        ({"something.else": 1}, r"something\.else is 1"),
    ],
)
def test_models_that_are_not_supported_are_refused(tmp_path, rng, metadata, message):
    weights = gguf_files.weights(rng)
    architecture = metadata.pop("general.architecture", "llama")
    path = gguf_files.write(tmp_path / "a.gguf", weights, architecture=architecture, metadata=metadata)
    with pytest.raises(InputError, match=message):
        gguf_model.config_of(files.read_header(path))


def test_a_list_of_equal_values_counts_as_one(tmp_path, rng):
    path = gguf_files.write(tmp_path / "a.gguf", gguf_files.weights(rng), metadata={"attention.head_count_kv": [4, 4]})
    assert gguf_model.config_of(files.read_header(path))["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"feed_forward_length": [48, 0]}, r"mlp_dim is 0, but must be a whole number from 1"),
        ({"attention.head_count": [8, 7]}, "heads 7 is not divisible by kv_heads 4"),
        ({"attention.head_count_kv": [4, 4, 4]}, r"deci\.attention\.head_count_kv has 3 numbers for 2 layers"),
        ({"attention.head_count": [8.0, 8.0]}, "must be one positive int"),
        ({"feed_forward_length": [512, 256]}, "mlp.gate_proj.weight has shape"),
    ],
)
def test_layers_of_different_sizes_that_do_not_fit_are_refused(tmp_path, rng, sizes, message):
    path = gguf_files.write(tmp_path / "a.gguf", gguf_files.weights(rng), "deci", metadata=sizes)
    with pytest.raises(InputError, match=message):
        gguf_model.load(path)


def test_a_tensor_no_architecture_has_is_refused(tmp_path, rng):
    extra = {"blk.0.ssm_in.weight": np.ones((2, 32), np.float32)}
    path = gguf_files.write(tmp_path / "a.gguf", gguf_files.weights(rng), extra=extra)
    with pytest.raises(InputError, match=r"'blk\.0\.ssm_in\.weight', which no supported architecture has"):
        gguf_model.names_of(files.read_header(path))


def header(tensors=(), pairs=(), version=3, tensor_count=None, pair_count=None, data=bytes(64), magic=b"GGUF"):
    """The bytes of a file, any of its numbers at will. tensors: (name, dims, type, offset); pairs: (key, bytes)."""
    text = lambda s: struct.pack("<Q", len(s)) + s
    raw = magic + struct.pack("<I", version)
    raw += struct.pack(
        "<QQ", len(tensors) if tensor_count is None else tensor_count, len(pairs) if pair_count is None else pair_count
    )
    for key, value in pairs:
        raw += text(key) + value
    for name, dims, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return raw + bytes(-len(raw) % 32) + data


STRINGS = struct.pack("<IIQ", 9, 8, 2**40)
BYTES = struct.pack("<IIQ", 9, 0, 2**63)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, fewer than any header"),
        (header(magic=b"GGML"), "does not begin with the letters GGUF"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(tensor_count=2**63), "claims 9,223,372,036,854,775,808 tensors"),
        (header(pair_count=2**40), "claims 1,099,511,627,776 key-value pairs"),
        (header(pairs=[(b"k", STRINGS)]), "claims 1,099,511,627,776 strings in 'k'"),
        (header(pairs=[(b"tokenizer.ggml.tokens", STRINGS)]), "strings in 'tokenizer.ggml.tokens'"),
        (header(pairs=[(b"k", struct.pack("<IIQQ", 9, 8, 2, 2**63))]), "an entry of 'k' ends at byte"),
        (header(pairs=[(b"k", struct.pack("<IIQQ", 9, 8, 1, 2**40))]), "an entry of 'k' ends at byte"),
        (
            header(pairs=[(b"tokenizer.ggml.tokens", struct.pack("<IIQQ", 9, 8, 1, 1) + b"\xff")]),
            "an entry of 'tokenizer.ggml.tokens' is not UTF-8",
        ),
        (header(pairs=[(b"k", BYTES)]), "bytes in the list 'k'"),
        (header(pairs=[(b"k", struct.pack("<IQ", 8, 2**63))]), "bytes in the value of 'k'"),
        (header(pairs=[(b"k", struct.pack("<IIQ", 9, 9, 1) + STRINGS)]), "list of values of type 9"),
        (header(pairs=[(b"k", struct.pack("<I", 77))]), "value of unknown type 77"),
        (header(pairs=[(b"k", struct.pack("<IB", 0, 1))] * 2), "the key 'k' twice"),
        (header(pairs=[(b"\xff", struct.pack("<IB", 0, 1))]), "a key is not UTF-8"),
        (header(pairs=[(b"general.alignment", struct.pack("<II", 4, 0))]), "general.alignment is 0"),
        (header(tensors=[(b"w", (4,), 0, 0)] * 2), "the tensor 'w' twice"),
        (header(tensors=[(b"w", (4,), 0, 0), (b"v", (4,), 0, 0)]), "overlaps another"),
        (header(tensors=[(b"w", (17,), 0, 0)]), "ends at byte 132, but the file has 128: fetch it again"),
        (header(tensors=[(b"w", (2**32, 2**32, 2), 0, 0)]), "ends at byte"),
        (header(tensors=[(b"w", (2**63, 2**63, 2**63, 2**63), 0, 0)]), "ends at byte"),
        (header(tensors=[(b"w", (4,), 0, 2**63)]), "ends at byte"),
        (header(tensors=[(b"w", (4,), 0, 7)]), "not a multiple of 32"),
        (header(tensors=[(b"w", (0, 4), 0, 0)]), "has no elements"),
        (header(tensors=[(b"w", (1, 1, 1, 1, 1), 0, 0)]), "5 dimensions"),
        (header(tensors=[(b"w", (33,), 8, 0)]), "rows of 33, but Q8_0 has blocks of 32"),
        (header(tensors=[(b"w", (32,), 9, 0)]), "ggml type Q8_1, but read are F32, F16, Q4_0"),
        (header(tensors=[(b"w", (32,), 999, 0)]), "ggml type 999"),
        (header(tensors=[(b"w", (4,), 0, 0)])[:50], "ends inside its header"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, raw, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        files.read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "label"), [("Q4_1", "Q4_1"), ("Q8_0", "Q8_0"), ("F16", "")])
def test_what_weights_were_quantized_to_is_said(tmp_path, rng, kind, label):
    weights = gguf_files.weights(rng, width=64, hidden=64)
    path = gguf_files.write(tmp_path / "a.gguf", weights, kind=kind)
    assert gguf_model.quantization(path) == label
    assert sources.load(path).about == ({"dequantized": label} if label else {})


def test_rows_that_only_pad_the_embedding_are_no_tokens():
    """llama.cpp's converter names them [PAD0] and so on, of the type "unused"."""

    def read(padding):
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": [*gguf_files.TOKENS, *(f"[PAD{i}]" for i in range(padding))],
            "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(gguf_files.TOKENS) - 2) + [5] * padding),
            "tokenizer.ggml.merges": gguf_files.MERGES,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
        return gguf_tokenizer.from_metadata(metadata, Path("a.gguf"))

    plain, padded, count = read(0), read(3), len(gguf_files.TOKENS)
    assert padded.ids_digest == plain.ids_digest
    assert padded.encode("[PAD1]") == plain.encode("[PAD1]")
    assert fitted.unused(padded, count + 3) == ((count, count + 3),)
