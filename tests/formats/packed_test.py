"""Checkpoints of compressed-tensors, GPTQ and AWQ: those of others, and what is exported as such or as floats."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.quantize import quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.formats import compressed_tensors, efflm_file, gguf_check, huggingface, packed, tensors, transformers_check
from efflm.model import LanguageModel
from efflm.model.params import in_layer
from efflm.ops import QArray
from efflm.ops.lowrank import LowRank
from efflm.parallel import meshes
from tests import tiny
from tests.formats.huggingface_test import change_config, require_equal, small_tokenizer

PACKED = Path(__file__).parent / "goldens" / "packed"
NAMES = sorted(path.stem for path in PACKED.glob("*.npz"))
KINDS = {  # of down's matrix: bits, group, whether there are zero points, dtype of scales
    "w8a8": (8, 0, False, "float32"),
    "w8a16": (8, 0, False, "float32"),
    "w4a16": (4, 32, False, "float32"),
    "w4a16_asym": (4, 32, True, "float32"),
    "mixed": (4, 32, False, "float32"),
    "gptq4": (4, 32, False, "float16"),
    "gptq4_asym": (4, 32, True, "float16"),
    "gptq4_v2": (4, 32, True, "float16"),
    "gptq8": (8, 32, False, "float16"),
    "gptq3": (3, 32, True, "float16"),
    "awq4": (4, 32, True, "float16"),
}


def quantized(model: LanguageModel) -> dict[str, QArray]:
    return {path: w for path, w in trees.flatten(model.params) if isinstance(w, QArray)}


def with_activations(model: LanguageModel, activations: str) -> LanguageModel:
    change = lambda _, w: w.replace(activations=activations) if isinstance(w, QArray) else w
    return model.replace(params=trees.map_with_path(change, model.params))


# --- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_others_compute_what_their_own_tools_say(name):
    """The logits are those of the weights that the tool itself unpacks (see make_packed_goldens)."""
    model, golden = huggingface.load_weights(PACKED / name), np.load(PACKED / f"{name}.npz")
    down = model.params["block_0"]["feedforward"]["down"]["kernel"]
    assert (down.bits, down.group, down.zeros is not None, down.scale.dtype) == KINDS[name]
    assert len(quantized(model)) == 7
    rounds = {path for path, w in quantized(model).items() if w.activations == "int8"}
    assert rounds == {path for path in quantized(model) if name == "w8a8" or (name == "mixed" and "attention" in path)}
    model = with_activations(model, "float")
    model = model.replace(config=dataclasses.replace(model.config, precision="float32"))
    np.testing.assert_allclose(tiny.logits(model, golden["tokens"]), golden["logits"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_saved_and_loaded_bit_for_bit(name, tmp_path):
    model = huggingface.load_weights(PACKED / name)
    efflm_file.save(tmp_path / "model.safetensors", model, {})
    require_equal(efflm_file.load(tmp_path / "model.safetensors")[0], model)
    compressed_tensors.save(tmp_path / "again", model, small_tokenizer())
    again = huggingface.load_weights(tmp_path / "again")
    widened = lambda w: w.replace(values=packed.pack(np.asarray(ops.qarray.codes(w)), 4, -2), bits=4)
    for path, w in quantized(model).items():
        require_same_leaves(quantized(again)[path], widened(w) if w.bits == 3 else w)
    huggingface.save(tmp_path / "floats", model, small_tokenizer())
    for path, w in trees.flatten(huggingface.load_weights(tmp_path / "floats").params):
        np.testing.assert_array_equal(w, in_float64(dict(trees.flatten(model.params))[path]).astype(np.float32))


def require_same_leaves(a: QArray, b: QArray) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def in_float64(w) -> np.ndarray:
    """(codes - zeros) * scale in numpy; at most 8 + 24 bits, which float64 holds."""
    if not isinstance(w, QArray):
        return np.asarray(w).astype(np.float64)
    w = ops.qarray.in_full(w)
    codes = np.asarray(ops.qarray.codes(w)).astype(np.float64)
    spread = lambda part: np.repeat(np.asarray(part).astype(np.float64), w.group or w.size, axis=w.axis)[
        : codes.shape[0], : codes.shape[1]
    ]
    return (codes - (0 if w.zeros is None else spread(w.zeros))) * spread(w.scale)


@pytest.fixture
def folder(request, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(PACKED / getattr(request, "param", "gptq4"), tmp_path / "model"))


def change(folder: Path, tensors_of: dict | None = None, **settings) -> None:
    """Other tensors, and other settings of the quantization_config."""
    if tensors_of:
        source = tensors.from_safetensors(folder / "model.safetensors")
        whole = {name: source.read(name) for name in source.shapes} | tensors_of
        named = [(name, jax.ShapeDtypeStruct(x.shape, x.dtype), lambda x=x: x) for name, x in whole.items()]
        tensors.write_safetensors(folder / "new", named)
        (folder / "new").replace(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, {"quantization_config": values | settings})


Q_PROJ = "model.layers.0.self_attn.q_proj"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def group(targets=("Linear",), inputs=None, **weights) -> dict:
    scheme = {"targets": list(targets), "weights": WEIGHTS | weights, "input_activations": inputs}
    return {"config_groups": {"group_0": scheme}}


def test_what_auto_round_says_beside_changes_nothing(folder):
    before = huggingface.load_weights(folder)
    said = {"autoround_version": "0.15.1", "provider": "auto-round", "data_type": "int"}
    change(folder, **said, static_attention_granularity="tensor", static_kv_granularity="tensor")
    require_equal(huggingface.load_weights(folder), before)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq4", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', but only compressed-tensors, gptq"),
        ("gptq4", {"quant_method": None}, "the quant_method None, but only"),
        (
            "gptq4",
            {"bits": 5},
            "bits in the quantization_config is 5, but only 8 or 4 or 3 or 2 is supported:",
        ),
        ("gptq4", {"bits": True}, "bits in the quantization_config is True"),
        (
            "gptq4",
            {"bits": 8},
            r"qweight has shape \(8, 64\), but the quantization_config and the sizes say \(16, 64\)",
        ),
        ("gptq4", {"group_size": 0}, "group_size in the quantization_config is 0, but must be -1 or a positive"),
        ("gptq4", {"group_size": 64}, "has shape"),
        ("gptq4", {"checkpoint_format": "marlin"}, "checkpoint_format .* is 'marlin', but only 'gptq' or 'gptq_v2'"),
        ("gptq4", {"is_marlin_format": True}, "is_marlin_format in the quantization_config is True, which"),
        ("gptq4", {"dynamic": {"-:.*": {}}}, "dynamic in the quantization_config is .* which is not supported: if it"),
        (
            "gptq4",
            {"data_type": "mx_fp"},
            "data_type in the quantization_config is 'mx_fp', but only 'int' is supported",
        ),
        ("gptq4", {"rotation": "hadamard"}, "rotation in the quantization_config is 'hadamard'"),
        (
            "awq4",
            {"version": "gemv"},
            "version in the quantization_config is 'gemv', but only 'gemm' or 'GEMM' is supported",
        ),
        ("awq4", {"bits": 8}, "bits in the quantization_config is 8, but only 4 is supported"),
        ("w8a8", {"format": "float-quantized"}, "format .* is 'float-quantized', but only 'int-quantized' or"),
        ("w8a8", {"format": "nvfp4-pack-quantized"}, "format in the quantization_config is 'nvfp4-pack-quantized'"),
        ("w8a8", {"format": "marlin-24"}, "format in the quantization_config is 'marlin-24'"),
        ("w8a8", {"quantization_status": "frozen"}, "is 'frozen', but only 'compressed' is supported"),
        ("w8a8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config in the quantization_config"),
        ("w8a8", {"transform_config": {"config_groups": 1}}, "transform_config in the quantization_config is"),
        ("w8a8", {"kv_cache_scheme": WEIGHTS}, "kv_cache_scheme in the quantization_config is"),
        ("w8a8", {"config_groups": {}}, "config_groups in the quantization_config is {}, but must be an object"),
        ("w8a8", {"ignore": "lm_head"}, "'lm_head' in the quantization_config must be a list of modules"),
        ("w8a8", {"ignore": ["re:(a+)+$"]}, "the pattern .* could take too long: name modules"),
        ("w8a8", {"ignore": ["re:[a"]}, "is no pattern"),
        ("w8a8", {"ignore": []}, r"lm_head\.weight_scale is missing, which the quantization_config speaks of"),
        ("w8a8", {"ignore": ["lm_head", Q_PROJ]}, r"q_proj\.weight_scale is left over"),
        ("w4a16", group(type="float"), "type in the quantization_config is 'float', but only 'int' is supported"),
        ("w4a16", group(strategy="tensor"), "strategy .* is 'tensor', but only 'channel' or 'group' is supported"),
        ("w4a16", group(actorder="group"), "actorder in the quantization_config is 'group'"),
        ("w4a16", group(num_bits=5), "num_bits in the quantization_config is 5"),
        ("w4a16", group(symmetric=False), "weight_zero_point is missing"),
        ("w4a16", group(inputs=INPUTS | {"num_bits": 4}), "num_bits in the quantization_config is 4, but only 8"),
        ("w4a16", group(inputs=INPUTS | {"symmetric": False}), "symmetric in the quantization_config is False"),
        ("w4a16", group(inputs=INPUTS | {"strategy": "group"}), "strategy .* is 'group', but only 'token'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, settings, message, tmp_path):
    folder = Path(shutil.copytree(PACKED / name, tmp_path / "model"))
    change(folder, **settings)
    with pytest.raises(InputError, match=message) as error:
        huggingface.load_weights(folder)
    assert "\n" not in str(error.value)


def test_names_go_before_patterns_and_these_before_kinds(tmp_path):
    folder = Path(shutil.copytree(PACKED / "mixed", tmp_path / "model"))
    groups = list(json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values())
    eight, four = sorted(groups, key=lambda each: -each["weights"]["num_bits"])
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    for targets in ((["Linear"], attention), (["re:.*mlp.*"], ["Linear"]), (["re:.*_proj$"], attention)):
        change(folder, config_groups={"a": four | {"targets": targets[0]}, "b": eight | {"targets": targets[1]}})
        require_equal(huggingface.load_weights(folder), huggingface.load_weights(PACKED / "mixed"))


def test_the_order_of_inputs_must_be_theirs(folder):
    order = np.arange(64, dtype=np.int32) // 32
    change(folder, {f"{Q_PROJ}.g_idx": order[::-1].copy()})
    with pytest.raises(InputError, match=r"q_proj\.g_idx says that groups are of inputs in another order \(desc_act\)"):
        huggingface.load_weights(folder)
    change(folder, {f"{Q_PROJ}.g_idx": order})
    require_equal(huggingface.load_weights(folder), huggingface.load_weights(PACKED / "gptq4"))


def test_biases_that_are_zero_change_nothing(folder):
    change(folder, {f"{Q_PROJ}.bias": np.zeros(64, np.float16)})
    require_equal(huggingface.load_weights(folder), huggingface.load_weights(PACKED / "gptq4"))
    change(folder, {f"{Q_PROJ}.bias": np.ones(64, np.float16)})
    with pytest.raises(InputError, match=r"q_proj\.bias is not 0, as the biases are that a quantizer adds"):
        huggingface.load_weights(folder)


def test_without_its_config_a_quantized_model_is_told_from_a_damaged_one(folder):
    change_config(folder, {"quantization_config": None})
    with pytest.raises(InputError, match=r"config\.json has no quantization_config; copy the content of its quantize_"):
        huggingface.load_weights(folder)


# --- out -------------------------------------------------------------------------------------------------------------

EXPORTS = {  # name: (config, what matrices become)
    "w8a16": ("untied", {}),
    "w8a8": ("llama", {"activations": "int8"}),
    "w4a16": ("qwen2", {"bits": 4, "group": 16}),
    "w4a16_channel": ("neox", {"bits": 4}),
    "w4a16_asym": ("neox", {"bits": 4, "group": 16, "symmetric": False}),
    "w4a16_super": ("untied", {"bits": 4, "group": 16, "symmetric": False, "super_block": 256}),
    "w8a8_asym": ("qwen3", {"activations": "int8", "symmetric": False}),
    "w8a16_experts": ("mixtral", {}),
    "w3a16": ("llama", {"bits": 3, "group": 16}),
    "w5a16": ("llama", {"bits": 5, "group": 16}),
}


def fields(words: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Code i of each row is bits i * bits and up of its words, counted from the least: as integers of any length."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words]
    return np.array([[row >> i * bits & (1 << bits) - 1 for i in range(size)] for row in rows])


@pytest.mark.parametrize("name", EXPORTS)
def test_compressed_tensors_hold_the_codes_and_come_back(name, tmp_path):
    config, how = EXPORTS[name]
    bits = how.get("bits", 8)
    stored = {3: 4, 5: 8}.get(bits, bits)
    golden = PACKED.parent / config
    model = tiny.model(tiny.CONFIGS[config]) if config in tiny.CONFIGS else huggingface.load_weights(golden)
    model = model.replace(params=quantize(model.params, **how))
    said = compressed_tensors.save(tmp_path / "model", model, small_tokenizer())
    back = huggingface.load_weights(tmp_path / "model")
    full = lambda path, w: ops.qarray.in_full(w) if in_layer(path) and isinstance(w, QArray) else w
    model = model.replace(params=trees.map_with_path(full, model.params))
    leaves = dict(trees.flatten(model.params))
    for path, w in trees.flatten(back.params):
        if in_layer(path):
            assert (w.bits, w.group, w.activations) == (
                stored,
                leaves[path].group,
                leaves[path].activations,
            )
            require_same_leaves(
                w.replace(values=ops.qarray.codes(w), bits=8),
                leaves[path].replace(values=ops.qarray.codes(leaves[path]), bits=8),
            )
        else:
            np.testing.assert_array_equal(w, in_float64(leaves[path]).astype(np.float32))
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    routers = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)] * (config == "mixtral")
    assert settings["ignore"] == ["embed_out"] * (config == "neox") + ["lm_head", *routers]  # also where it is tied
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
    written = tensors.from_safetensors(tmp_path / "model" / "model.safetensors")
    nbytes = sum(written.read(each).nbytes for each in written.shapes)
    outside = sum(np.prod(w.shape) * 4 - trees.nbytes(w) for path, w in quantized(model).items() if not in_layer(path))
    assert any(f"written as float32, {outside:,} bytes more" in line for line in said)
    values = sum(trees.nbytes(w.values) for path, w in quantized(model).items() if in_layer(path))
    wider = values * (stored - bits) // bits
    assert wider == 0 or any(f"the same codes of {stored} bits, {wider:,} bytes more" in line for line in said)
    shapes = 16 * sum(each.endswith("weight_shape") for each in written.shapes)
    signed = sum(
        w.zeros.size for path, w in quantized(model).items() if w.zeros is not None and in_layer(path) and w.bits < 8
    )
    assert nbytes == trees.nbytes(model.params) + outside + wider + shapes - signed // 2
    if config in ("neox", "mixtral"):
        return
    w, module = leaves["block_0/feedforward/down/kernel"], "model.layers.0.mlp.down_proj"
    codes = np.asarray(ops.qarray.codes(w)).T.astype(int)
    np.testing.assert_array_equal(written.read(f"{module}.weight_scale"), np.asarray(w.scale).T)
    if w.activations == "float":
        bits = stored
        packed_codes = fields(written.read(f"{module}.weight_packed"), bits, w.size)
        np.testing.assert_array_equal(packed_codes - 2 ** (bits - 1), codes)
        assert written.read(f"{module}.weight_shape").tolist() == list(codes.shape)
    else:
        np.testing.assert_array_equal(written.read(f"{module}.weight"), codes)


def test_zero_points_are_packed_along_the_outputs(tmp_path):
    model = tiny.model(tiny.CONFIGS["llama"])
    model = model.replace(params=quantize(model.params, bits=4, group=16, symmetric=False))
    compressed_tensors.save(tmp_path / "model", model, small_tokenizer())
    written = tensors.from_safetensors(tmp_path / "model" / "model.safetensors")
    zeros = model.params["block_0"]["feedforward"]["up"]["kernel"].zeros
    words = written.read("model.layers.0.mlp.up_proj.weight_zero_point")
    np.testing.assert_array_equal(fields(words.T, 4, 48) - 8, zeros)


def test_formats_are_told_by_matrix_where_they_differ(tmp_path):
    model = tiny.model(tiny.CONFIGS["untied"])
    leaves = dict(trees.flatten(model.params))
    kinds = {"query": ops.Format(bits=4, group=16), "up": ops.Format(activations="int8"), "down": ops.Format()}
    for path, w in leaves.items():
        kind = kinds.get(path.split("/")[-2]) if "/" in path else None
        leaves[path] = ops.quantize_array(w, -2, kind) if kind else w
    model = model.replace(params=trees.unflatten(leaves))
    assert compressed_tensors.save(tmp_path / "model", model, small_tokenizer()) == []
    require_equal(huggingface.load_weights(tmp_path / "model"), model)
    written = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    assert {"lm_head", "model.layers.1.self_attn.k_proj"} < set(written["ignore"])
    assert [each["format"] for each in written["config_groups"].values()].count("int-quantized") == 1


def test_static_scales_of_activations_are_kept(tmp_path):
    model = tiny.model(tiny.CONFIGS["untied"])
    params = quantize(model.params, activations="int8")
    scale = lambda path, w: w.replace(activations="int8_static", activation_scale=jnp.full((1, 1), 0.01 * len(path)))
    params = trees.map_with_path(lambda path, w: scale(path, w) if isinstance(w, QArray) else w, params)
    said = compressed_tensors.save(tmp_path / "model", model.replace(params=params), small_tokenizer())
    assert any("the model rounds what its int8 matmuls read" in line for line in said)
    back = huggingface.load_weights(tmp_path / "model").params["block_0"]["attention"]["value"]["kernel"]
    require_same_leaves(back, params["block_0"]["attention"]["value"]["kernel"])


def test_what_compressed_tensors_cannot_say_is_refused_with_what_can(tmp_path):
    model, tokens = tiny.model(), small_tokenizer()

    def refused(params, message, config="llama"):
        one = tiny.model(tiny.CONFIGS[config])
        with pytest.raises(InputError, match=message + '.*format="huggingface", which writes floats'):
            compressed_tensors.save(tmp_path / "model", one.replace(params=params), tokens)

    refused(model.params, "no matrix inside the layers is quantized")
    refused(quantize(model.params, bits=4, group=20), "has 32 inputs in groups of 20, but .* no shorter last group")
    gpt2 = quantize(tiny.model(tiny.CONFIGS["gpt2"]).params)
    refused(gpt2, "block_0/attention/query/kernel is no Linear in models of the family gpt2", "gpt2")
    refused(trees.map_with_path(adapted, quantize(model.params)), "has a correction of low rank")
    neox = tiny.model(tiny.CONFIGS["neox"])
    parts = trees.map_with_path(lambda path, w: quantize({path: w})[path] if "query/kernel" in path else w, neox.params)
    with pytest.raises(InputError, match="are one matrix in this family, but are in formats of their own"):
        compressed_tensors.save(tmp_path / "model", neox.replace(params=parts), tokens)
    assert not list(tmp_path.iterdir())


def adapted(path, w):
    """A weight of the layers with a correction of rank 2."""
    if not in_layer(path):
        return w
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)
    return LowRank(w, make(w.shape[0], 2), make(2, w.shape[1]))


@pytest.mark.parametrize("kept_as", ["float32", "bfloat16"])
def test_any_compressed_model_is_written_as_the_floats_it_stands_for(kept_as, tmp_path):
    chain = grammar.chain("magnitude@2:4,quantize[bits=4,group=16]")
    model, _ = recipe.apply(tiny.model(), chain, Context(mesh=meshes.make_mesh()))
    scales = lambda w: w.replace(scale=w.scale.astype(kept_as)) if isinstance(w, QArray) else w
    model = model.replace(params=trees.map_with_path(lambda _, w: scales(w), model.params))
    low = model.replace(params=trees.map_with_path(adapted, model.params))
    said = huggingface.save(tmp_path / "low", low, small_tokenizer())
    assert said == [
        "15 compressed weights are written as float32",
        "pruned weights are zeros in dense matrices: no engine multiplies these faster",
    ]
    huggingface.save(tmp_path / "model", model, small_tokenizer())
    back = huggingface.load_weights(tmp_path / "model")
    for path, w in trees.flatten(back.params):
        assert w.dtype == jnp.float32
        np.testing.assert_array_equal(w, in_float64(dict(trees.flatten(model.params))[path]).astype(np.float32))
    assert all(
        not np.asarray(dict(trees.flatten(back.params))[path])[~np.asarray(mask)].any()
        for path, mask in model.masks.items()
    )
    for path, w in trees.flatten(huggingface.load_weights(tmp_path / "low").params):
        part = dict(trees.flatten(low.params))[path]
        if isinstance(part, LowRank):
            product = np.asarray(part.a, np.float64) @ np.asarray(part.b, np.float64)
            np.testing.assert_allclose(w, in_float64(part.base) + product, atol=1e-6)


def test_a_model_is_written_whole_and_as_it_is_or_not_at_all(tmp_path, monkeypatch):
    model = tiny.model()
    model = model.replace(params=quantize(model.params, bits=4, group=16))
    right = packed._words
    monkeypatch.setattr(packed, "_words", lambda *args: np.roll(right(*args), 1, axis=-1))
    with pytest.raises(InputError, match="block_0/attention/query/kernel is not read back as it was written"):
        compressed_tensors.save(tmp_path / "model", model, small_tokenizer())
    assert not list(tmp_path.iterdir())


def test_what_transformers_computes_otherwise_is_not_left_behind(tmp_path, monkeypatch):
    """With a program in its place, which gives the model's logits, others, or none."""
    model, tokens = tiny.model(), small_tokenizer()
    model = model.replace(params=quantize(model.params))
    ids = np.array([tokens.encode(gguf_check.TEXT)[:64]], np.int32)
    monkeypatch.setattr(transformers_check.importlib.util, "find_spec", lambda name: name)

    def save(program):
        monkeypatch.setattr(transformers_check, "PROGRAM", f"import sys, numpy\n{program}")
        return compressed_tensors.save(tmp_path / "model", model, tokens, check=True)[-1]

    compressed_tensors.save(tmp_path / "known", model, tokens)
    np.save(tmp_path / "logits.npy", gguf_check.logits(huggingface.load_weights(tmp_path / "known"), ids))
    right = f"numpy.load({str(tmp_path / 'logits.npy')!r})"
    with pytest.raises(InputError, match="transformers does not load what was written: ValueError: no such kind"):
        save("raise ValueError('no such kind')")
    with pytest.raises(InputError, match="transformers' logits differ from the model's by"):
        save(f"numpy.save(sys.argv[3], {right}[:, ::-1])")
    assert not (tmp_path / "model").exists()
    said = save(f"assert numpy.load(sys.argv[2]).shape == {ids.shape}\nnumpy.save(sys.argv[3], {right})")
    assert "differ by 0 of their standard deviation" in said
    assert said in (tmp_path / "model" / "README.md").read_text()


def test_a_card_tells_where_a_model_is_from(tmp_path):
    model = tiny.model()
    after, records = recipe.apply(model, grammar.chain("quantize"), Context(mesh=meshes.make_mesh()))
    about = {"source": "hf:org/name", "lineage": [dataclasses.asdict(record) for record in records]}
    about |= {
        "command": "bash launch/run.sh experiments.export",
        "figures": {"bits per byte": "1.25 | +-0.01"},
        "protocol": ["x"],
    }
    compressed_tensors.save(tmp_path / "model", after.with_about(about), small_tokenizer())
    text = (tmp_path / "model" / "README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert "base_model: org/name" in head
    assert "- compressed-tensors" in head
    assert "| Quantize |" in body
    assert "| bits per byte | 1.25 \\| +-0.01 |" in body
    assert "    bash launch/run.sh experiments.export" in body
    assert "embedding: written as float32" in body
