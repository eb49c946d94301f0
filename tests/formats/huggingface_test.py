"""Families of models against transformers, and Hugging Face directories back and forth."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from efflm import trees
from efflm.config import InputError
from efflm.config.model import BlockConfig, ModelConfig
from efflm.formats import efflm_file as own
from efflm.formats import huggingface, tensors, translate
from efflm.formats.families import FAMILIES
from efflm.infer.generate import forward
from efflm.model import LanguageModel, empty_cache, in_dtype, params, placement
from efflm.parallel import meshes
from efflm.text.tokenizer import Tokenizer
from tests import tiny

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))


def small_tokenizer() -> Tokenizer:
    """A character a token, few enough of them for the goldens' vocabulary, and an end."""
    characters = ["<end>", *"abcdefghijklmnopqrstuvwxyz ,."]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(["<end>"])
    return Tokenizer(core, {"eos_token": "<end>"}, template="{{ messages[0]['content'] }}")


@pytest.fixture
def folder(tmp_path):
    """A golden model of its own to damage."""
    return Path(shutil.copytree(GOLDENS / "llama3", tmp_path / "model"))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def change_config(folder: Path, change: dict) -> None:
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not DROPPED})
    )


DROPPED = object()


def require_equal(a: LanguageModel, b: LanguageModel) -> None:
    assert dataclasses.replace(a.config, unused=()) == dataclasses.replace(b.config, unused=())
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for one, other in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_at_once_and_token_by_token(name):
    model, golden = huggingface.load_weights(GOLDENS / name), np.load(GOLDENS / f"{name}.npz")
    tokens, expected = golden["tokens"], golden["logits"]
    np.testing.assert_allclose(tiny.logits(model, tokens), expected, atol=1e-4)
    step = jax.jit(lambda model, tokens, cache: forward(model, tokens, cache=cache))
    first, cache = step(model, tokens[:, :3], empty_cache(model.config, 2, 48))
    steps = [first]
    for t in range(3, tokens.shape[1]):
        logits, cache = step(model, tokens[:, t : t + 1], cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_wrote_is_written_again(name, tmp_path):
    huggingface.save(tmp_path / name, huggingface.load_weights(GOLDENS / name), small_tokenizer())
    before, after = stored(GOLDENS / name), stored(tmp_path / name)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)


def test_every_family_has_a_golden():
    models = [json.loads(path.read_text())["model_type"] for path in GOLDENS.glob("*/config.json")]
    assert set(models) == set(FAMILIES)
    assert sum(file.stat().st_size for file in GOLDENS.rglob("*.*")) < 1_600_000


# --- back and forth --------------------------------------------------------------------------------------------------


TINY = ("llama", "qwen2", "neox")  # with windows, scaling and untied embeddings in other combinations
HALVES = [("llama3", "bfloat16"), ("gpt2", "bfloat16"), ("gpt_neox", "float16")]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in NAMES), *((f"tiny {name}", "float32") for name in TINY), *HALVES],
)
def test_models_come_back_bit_for_bit(name, dtype, tmp_path):
    if name.startswith("tiny "):
        model = tiny.model(tiny.CONFIGS[name.removeprefix("tiny ")])
    else:
        model = huggingface.load_weights(GOLDENS / name)
    model, tokens = in_dtype(model, dtype), small_tokenizer()
    huggingface.save(tmp_path / "a" / "model", model, tokens)
    back, tokens_back = huggingface.load(tmp_path / "a" / "model")
    require_equal(back, model)
    assert tokens_back.digest == tokens.digest
    assert (tokens_back.stops, tokens_back.template) == (tokens.stops, tokens.template)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_wanted_dtype(stored_as, wanted, tmp_path):
    model = huggingface.load_weights(GOLDENS / "llama")
    model = in_dtype(model, stored_as)
    huggingface.save(tmp_path / "model", model, small_tokenizer())
    back = huggingface.load_weights(tmp_path / "model", dtype=wanted)
    require_equal(back, in_dtype(model, wanted))


def test_what_does_not_fit_a_dtype_is_not_made_infinite(folder):
    weights = stored(folder)
    weights["model.norm.weight"][3] = 1e6
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    for kept_as in ("float32", "bfloat16", "float64"):
        cast = {name: weight.astype(jnp.dtype(kept_as)) for name, weight in weights.items()}
        safetensors.numpy.save_file(cast, folder / "model.safetensors")
        with pytest.raises(
            InputError, match=r"model\.norm\.weight has numbers beyond .* float16: choose the dtype bfloat16 or float32"
        ):
            huggingface.load_weights(folder, dtype="float16")
        model = huggingface.load_weights(folder)
        with pytest.raises(
            InputError, match=r"final_norm/scale has numbers beyond .* float16: choose the dtype bfloat16 or float32"
        ):
            in_dtype(model, "float16")
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float64) * 1e300
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"model\.norm\.weight has numbers beyond 3\.4e\+38, the largest of float32: no dtype"
    ):
        huggingface.load_weights(folder)
    with pytest.raises(InputError, match="dtype is 'int8'"):
        huggingface.load_weights(folder, dtype="int8")


@pytest.mark.parametrize(
    ("kept_as", "of_norms", "named"),
    [
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "float32", "float16"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_models_of_several_dtypes_come_back_as_they_were(kept_as, of_norms, named, precision, tmp_path):
    model = in_dtype(huggingface.load_weights(GOLDENS / "llama"), kept_as)
    cast = lambda path, leaf: leaf.astype(of_norms) if "norm" in path else leaf
    config = dataclasses.replace(model.config, precision=precision)
    model = LanguageModel(config, trees.map_with_path(cast, model.params))
    huggingface.save(tmp_path / "model", model, small_tokenizer())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == named
    require_equal(huggingface.load_weights(tmp_path / "model"), model)
    own.save(tmp_path / "own.safetensors", model, {})
    require_equal(own.load(tmp_path / "own.safetensors")[0], model)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_mode_that_the_umask_leaves(mask, tmp_path):
    model, before = huggingface.load_weights(GOLDENS / "llama"), os.umask(mask)
    try:
        huggingface.save(tmp_path / "model", model, small_tokenizer())
        own.save(tmp_path / "own.safetensors", model, {})
    finally:
        os.umask(before)
    for path in [tmp_path / "own.safetensors", *(tmp_path / "model").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("name", ["llama3", "gpt2", "gpt_neox", "qwen3"])
def test_a_model_spread_over_eight_devices_is_the_same(name):
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    alone, spread = huggingface.load_weights(GOLDENS / name), huggingface.load_weights(GOLDENS / name, mesh=mesh)
    for path, leaf in trees.flatten(spread.params):
        spec = placement.partition_spec(path, leaf.shape, mesh)
        assert leaf.sharding == jax.NamedSharding(mesh, spec), path
        np.testing.assert_array_equal(leaf, dict(trees.flatten(alone.params))[path])
    assert spread.params["block_0"]["attention"]["query"]["kernel"].sharding.shard_shape((16, 16)) == (8, 8)


def test_a_placed_array_is_a_copy():
    raw = np.zeros(64 * 64 + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4  # at an address that JAX would take over without copying
    array = raw[start : start + 64 * 64].reshape(64, 64)
    placed = tensors.place(array, None, jax.NamedSharding(meshes.make_mesh(), jax.P()))
    array[:] = 1
    np.testing.assert_array_equal(placed, np.zeros((64, 64)))


def test_weights_do_not_lie_in_the_file(folder):
    model = huggingface.load_weights(folder)
    before = np.array(model.params["embedding"])
    raw = bytearray((folder / "model.safetensors").read_bytes())
    with (folder / "model.safetensors").open("r+b") as file:  # the same file, not a new one under its name
        file.write(bytes(len(raw)))
    np.testing.assert_array_equal(model.params["embedding"], before)


# --- what is tolerated, and what is not ------------------------------------------------------------------------------


def test_buffers_heads_of_tied_models_and_missing_prefixes_are_tolerated(tmp_path):
    for name, prefix in (("gpt2", "transformer."), ("qwen2", "model.")):
        folder = Path(shutil.copytree(GOLDENS / name, tmp_path / name))
        weights = {key.removeprefix(prefix): value for key, value in stored(folder).items()}
        embedding = "wte.weight" if name == "gpt2" else "embed_tokens.weight"
        extra = {
            "lm_head.weight": weights[embedding],
            "h.0.attn.bias": np.tri(64, dtype=bool)[None, None],
            "h.1.attn.masked_bias": np.float32([-1e4]),
        }
        if name == "qwen2":
            extra["layers.0.self_attn.rotary_emb.inv_freq"] = np.float16([1, 1e-3])  # of a base of 1e6 and heads of 4
        safetensors.numpy.save_file(weights | extra, folder / "model.safetensors")
        require_equal(huggingface.load_weights(folder), huggingface.load_weights(GOLDENS / name))


def test_a_head_of_its_own_counts_whatever_the_config_says_of_it(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "model"))
    weights = stored(folder)
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    safetensors.numpy.save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    model = huggingface.load_weights(folder)
    assert not model.config.tied
    np.testing.assert_array_equal(model.params["unembedding"], head.T)
    huggingface.save(tmp_path / "again", model, small_tokenizer())
    require_equal(huggingface.load_weights(tmp_path / "again"), model)
    safetensors.numpy.save_file(weights | {"lm_head.weight": head[:-1]}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \(47, 16\)"):
        huggingface.load_weights(folder)


@pytest.mark.parametrize(
    ("name", "buffer", "value", "message"),
    [
        ("gpt2", "h.0.attn.bias", np.ones((1, 1, 64, 64), np.float32), "is not causal"),
        ("gpt2", "h.0.attn.masked_bias", np.float32([0]), "is not a number that masks"),
        ("qwen2", "model.layers.0.self_attn.rotary_emb.inv_freq", np.float32([1, 2e-3]), "is not the rotary"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", np.ones(32, np.float32), "is left over"),
    ],
)
def test_buffers_that_say_another_thing_than_the_config_are_refused(tmp_path, name, buffer, value, message):
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / name))
    safetensors.numpy.save_file(stored(folder) | {buffer: value}, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        huggingface.load_weights(folder)
    assert buffer in str(error.value)


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    weights = stored(folder)

    def refused(changed, message):
        safetensors.numpy.save_file(changed, folder / "model.safetensors")
        with pytest.raises(InputError, match=message) as error:
            huggingface.load_weights(folder)
        assert "\n" not in str(error.value)

    gone = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    refused(gone, r"layers\.1\.mlp\.gate_proj\.weight, .*down_proj\.weight are missing: the model is not whole")
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}
    refused(weights | bias, r"q_proj\.bias is left over: the model has parts that its config does not speak of")
    transposed = {"model.layers.0.mlp.up_proj.weight": np.ones((16, 24), np.float32)}
    refused(weights | transposed, r"up_proj\.weight has shape \(16, 24\), but the model's config says \(24, 16\)")
    rounded = {"model.norm.weight": np.ones(16, np.int8)}
    refused(weights | rounded, r"model\.norm\.weight is stored as int8, but only floating-point weights are read")
    rounded = {"model.norm.weight": np.ones(16, np.int32)}
    refused(weights | rounded, r"model\.norm\.weight is stored as int32, but only floating-point weights are read")
    rounded = {"model.norm.weight": np.ones(16, np.uint32)}
    refused(weights | rounded, r"model\.norm\.weight .*is stored as U32, but only F64, F32, F16, BF16")


SCALED = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', but only llama, mistral, qwen2, qwen3, gemma2, ge"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"num_local_experts": 8}, "num_local_experts is 8, but models of this family have no experts"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map names code of the model's own"),
        ({"attention_bias": True}, "attention_bias is True, but only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but only silu, swish are supported"),
        ({"hidden_size": DROPPED}, "hidden_size is missing"),
        ({"hidden_size": None}, "hidden_size is None, but must be a whole number"),
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808"),
        ({"hidden_size": 16.0}, r"hidden_size is 16\.0"),
        ({"num_hidden_layers": 100}, "num_hidden_layers is 100, but must be a whole number from 1 to 21"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": 3}, "heads 3 is not divisible by kv_heads 2"),
        ({"num_attention_heads": 3, "head_dim": None}, "a width of 16 is not divisible by 3 heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', but must be true or false"),
        ({"rope_parameters": SCALED | {"rope_type": "longrope"}}, "rope_type is 'longrope', but only default, linear"),
        ({"rope_parameters": {"type": "dynamic", "factor": "2"}}, r"rope_parameters\.factor is '2'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, r"low_freq_factor is None"),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0, "beta_fast": 1}}, r"beta_fast is 1\.0, but must be above"),
        ({"rope_parameters": SCALED | {"type": "yarn", "truncate": 1}}, r"truncate is 1, but must be true or false"),
        ({"rope_parameters": SCALED | {"type": "yarn", "mscale": "x"}}, r"mscale is 'x', but must be a positive"),
        ({"rope_parameters": SCALED | {"type": "linear", "beta_fast": 32}}, r"beta_fast is 32, which is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling and rope_parameters say different"),
        ({"rope_theta": 5e5}, r"rope_theta is 500000\.0, but rope_theta elsewhere in the config is 100\.0"),
        ({"rope_parameters": {"mrope_section": [2, 2]}}, r"rope_parameters\.mrope_section is"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, r"rope_parameters\.factor is 4\.0"),
        ({"rope_parameters": {"rope_type": "default", "type": "mrope"}}, "but the type 'mrope'"),
        ({"sliding_window": 7}, "sliding_window is 7, which is not known of models of this family"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"logit_scale": 0.0625}, r"logit_scale is 0\.0625"),
        ({"embedding_multiplier": 12}, "embedding_multiplier is 12"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"qk_norm": False}, "qk_norm is False, .* remove it from the config"),
        ({"rope_parameters": SCALED | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5, but heads"),
        ({"rope_parameters": {"full_attention": SCALED}}, "rope_parameters differs from layer to layer"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types has sliding_attention, but the model has no window"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"original_max_position_embeddings": 7}, "original_max_position_embeddings is 7, but 32 is what counts"),
        ({"original_max_position_embeddings": "16"}, "original_max_position_embeddings is '16'"),
        ({"num_attention_heads": 8}, "has shape"),
    ],
)
def test_configs_that_are_not_supported_are_refused(folder, change, message):
    change_config(folder, change)
    with pytest.raises(InputError, match=message) as error:
        huggingface.load_weights(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], but only \[\] is supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, but only 1"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts is 4, but num_local_experts 5: remove one"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, but must be true or false"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv is 8\.0, but only None"),
        ("olmoe", {"num_experts_per_tok": 5}, "experts is 4 and experts_per_token 5"),
        ("olmoe", {"num_experts": 1000}, "1000 experts in each of 2 layers are more than there are tensors"),
        (
            "mixtral",
            {"num_local_experts": 3},
            r"gate\.weight has shape \(4, 16\), but the model's config says \(3, 16\)",
        ),
        ("mixtral", {"final_logit_softcapping": 3.0}, "final_logit_softcapping is 3"),
    ],
)
def test_mixtures_that_are_not_supported_are_refused(tmp_path, name, change, message):
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / name))
    change_config(folder, change)
    with pytest.raises(InputError, match=message):
        huggingface.load_weights(folder)


def test_what_configs_say_beside_changes_nothing(folder):
    """As published models of these families have it."""
    smollm2 = {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}}
    older = {
        "pretraining_tp": 1,
        "max_length": 20,
        "torchscript": False,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
        "n_special": 0,
        "predict_special_tokens": True,
        "output_past": True,
    }
    neutral = {
        "use_mrope": False,
        "num_experts": 0,
        "final_logit_softcapping": None,
        "unknown": None,
        "sliding_window": None,
    }
    trained = {
        "unsloth_version": "2024.9", "unsloth_tied": 1, "_commit_hash": "4e20", "trust_remote_code": False,
        "dropout": 0.1, "attention_bias": None, "quantization_config": None, "original_max_position_embeddings": 32,
    }  # fmt: skip
    change_config(folder, smollm2 | older | neutral | trained)
    require_equal(huggingface.load_weights(folder), huggingface.load_weights(GOLDENS / "llama3"))


def test_adapters_are_not_passed_over(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapters are not added to a model; have them merged"):
        huggingface.load_weights(folder)


def test_older_configs_mean_the_same(folder):
    scaling = json.loads((folder / "config.json").read_text())["rope_parameters"]
    base = scaling.pop("rope_theta")
    change_config(folder, {"rope_parameters": DROPPED, "rope_scaling": scaling, "rope_theta": base})
    require_equal(huggingface.load_weights(folder), huggingface.load_weights(GOLDENS / "llama3"))
    neox = Path(shutil.copytree(GOLDENS / "gpt_neox", folder.parent / "neox"))
    change_config(neox, {"rope_parameters": DROPPED, "rotary_pct": 0.25, "rotary_emb_base": 100})
    require_equal(huggingface.load_weights(neox), huggingface.load_weights(GOLDENS / "gpt_neox"))
    qwen2 = Path(shutil.copytree(GOLDENS / "qwen2_windows", folder.parent / "qwen2"))
    change_config(qwen2, {"layer_types": DROPPED})  # max_window_layers says it alone
    require_equal(huggingface.load_weights(qwen2), huggingface.load_weights(GOLDENS / "qwen2_windows"))


def test_older_configs_of_gemma_mean_the_same(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "gemma3", tmp_path / "gemma3"))
    older = {"rope_theta": 1e5, "rope_local_base_freq": 1e4, "rope_scaling": None, "cache_implementation": "hybrid"}
    change_config(folder, older | {"rope_parameters": DROPPED, "layer_types": DROPPED})
    require_equal(huggingface.load_weights(folder), huggingface.load_weights(GOLDENS / "gemma3"))
    rope = json.loads((GOLDENS / "gemma3" / "config.json").read_text())["rope_parameters"]
    for change, message in [
        ({"rope_parameters": rope | {"sliding_attention": SCALED | {"type": "linear"}}}, "sliding_attention is scaled"),
        ({"rope_parameters": rope | {"sliding_attention": 3}}, "rope_parameters holds 3, but must hold objects"),
        ({"rope_parameters": rope}, r"rope_local_base_freq is 20000\.0, but rope_theta elsewhere .* 10000\.0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0, but must be a whole number"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
    ]:
        change_config(folder, {"rope_local_base_freq": 2e4} | change)
        with pytest.raises(InputError, match=message):
            huggingface.load_weights(folder)


def test_pickles_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        huggingface.load_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(InputError, match=r"it has pytorch_model\.bin but no .*: pickled weights can run any code"):
        huggingface.load_weights(folder)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_transformers_could_not_load_is_not_written(tmp_path):
    model, tokens = huggingface.load_weights(GOLDENS / "llama"), small_tokenizer()
    blocks = (model.config.blocks[0], dataclasses.replace(model.config.blocks[1], mlp_dim=52))
    unequal = model.replace(config=dataclasses.replace(model.config, blocks=blocks))
    with pytest.raises(InputError, match=r"none of the families llama, .* has models of this shape"):
        huggingface.save(tmp_path / "unequal", unequal, tokens)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokens, folder = huggingface.load_weights(GOLDENS / "llama"), small_tokenizer(), tmp_path / "model"

    def full(path, names):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensors, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            huggingface.save(folder, model, tokens)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    huggingface.save(folder, model, tokens)  # an empty folder may be there
    with pytest.raises(InputError, match="exists already"):
        huggingface.save(folder, model, tokens)
    require_equal(huggingface.load(folder)[0], model)


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
import jax
from efflm import trees
from efflm.formats import huggingface

# Not ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
huggingface.load_weights(Path(sys.argv[1]))
before = peak()
model = huggingface.load_weights(Path(sys.argv[2]), dtype=sys.argv[3])
jax.block_until_ready(model.params)
print((peak() - before) / trees.nbytes(model.params))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc")
@pytest.mark.parametrize(
    ("kept_as", "wanted"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_loading_peaks_at_most_at_1_3_times_the_model(kept_as, wanted, tmp_path):
    block = BlockConfig(heads=8, kv_heads=4, head_dim=64, mlp_dim=1536)
    config = ModelConfig(vocabulary=32000, width=512, max_length=64, blocks=(block,) * 12)
    family, description = translate.describe(config)
    dtype, folder = jnp.dtype(kept_as), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    named = []
    for path, param in params.table(config).items():
        place = FAMILIES[family].place(path)
        kind = jax.ShapeDtypeStruct(translate.stored_shape(param.shape, place), dtype)
        random = lambda kind=kind: np.random.default_rng(0).standard_normal(kind.shape, np.float32).astype(kind.dtype)
        named.append((place.tensor(path), kind, random))
    tensors.write_safetensors(folder / "model.safetensors", named)
    command = [sys.executable, "-c", MEASURE, str(GOLDENS / "llama"), str(folder), wanted]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], timeout=300
    )
    assert 0.9 < float(done.stdout) <= 1.3
