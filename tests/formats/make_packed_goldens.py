"""Small quantized models as the tools of others write them and what their weights compute; and the way back.

    PEER tests/formats/make_packed_goldens.py compressed_tensors    # writes tests/formats/goldens/packed, checked in
    PEER tests/formats/make_packed_goldens.py gptqmodel
    python -m tests.formats.make_packed_goldens export FOLDER       # efflm writes models of its own into FOLDER
    PEER tests/formats/make_packed_goldens.py check FOLDER          # transformers loads these unchanged

PEER is a Python with torch, transformers (5.24) and what is named: llmcompressor (0.14) with compressed-tensors, or
gptqmodel (7.7) with optimum. Neither efflm nor its tests import these. `check` needs compressed-tensors (0.20).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

PACKED = Path(__file__).parent / "goldens" / "packed"
LENGTH = 24  # of rows of tokens
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPTQ = {  # name: how GPTQModel is asked for it
    "gptq4": {"bits": 4, "sym": True},
    "gptq4_asym": {"bits": 4, "sym": False},
    "gptq4_v2": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "gptq8": {"bits": 8, "sym": True},
    "gptq3": {"bits": 3, "sym": False},
    "awq4": None,
}


def _model(torch, transformers, dtype, **sizes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # not centered on zero, so that zero points differ
            weight.copy_((weight == 1).all() + 0.03 + 0.1 * torch.randn_like(weight))
    return model.to(dtype)


def _keep(torch, folder: Path, model, weights: dict) -> None:
    """Keep the folder's weights and config, and the logits of a model of floats with these weights."""
    name = folder.name
    (PACKED / name).mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, PACKED / name / file)
    model = model.float()
    tokens = torch.randint(0, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for path, weight in weights.items():
            model.get_submodule(path).weight.copy_(weight)
        logits = model(tokens).logits
    np.savez_compressed(PACKED / f"{name}.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(name, float(logits.abs().max()))


def compressed_tensors() -> None:
    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def scheme(targets, bits, group=0, symmetric=True, inputs=None):
        how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, **how)
        return QuantizationScheme(targets=[targets], weights=weights, input_activations=inputs)

    token = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    models = {
        "w8a8": {"a": scheme("Linear", 8, inputs=token)},
        "w8a16": {"a": scheme("Linear", 8)},
        "w4a16": {"a": scheme("Linear", 4, 32)},
        "w4a16_asym": {"a": scheme("Linear", 4, 32, symmetric=False)},
        "mixed": {"a": scheme("re:.*mlp.*", 4, 32), "b": scheme("re:.*self_attn.*", 8, inputs=token)},
    }
    with tempfile.TemporaryDirectory() as home:
        for name, groups in models.items():
            _model(torch, transformers, torch.float32).save_pretrained(Path(home) / "base")
            model = transformers.AutoModelForCausalLM.from_pretrained(Path(home) / "base")
            oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], config_groups=groups))
            model.save_pretrained(Path(home) / name, save_compressed=True)
            with torch.no_grad():
                model(torch.zeros(1, 4).long())  # it unpacks its weights in its first pass
            weights = {
                path: module.weight for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)
            }
            _keep(torch, Path(home) / name, _model(torch, transformers, torch.float32), weights)


def gptqmodel() -> None:
    os.cpu_count = lambda: 8  # with fewer, GPTQModel 7.7 makes no threads to load models with
    import tokenizers
    import torch
    import transformers
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.quantization.config import FORMAT, AWQConfig

    characters = ["<end>", *"abcdefghijklmnopqrstuvwxyz ,."]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    rows = np.random.default_rng(1).integers(1, SIZES["vocab_size"], (32, LENGTH)).tolist()
    text = [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows]
    with tempfile.TemporaryDirectory() as home:
        for name, how in GPTQ.items():
            base, sizes = Path(home) / "base", {} if how else {"num_key_value_heads": 4, "intermediate_size": 128}
            _model(torch, transformers, torch.float16, **sizes).save_pretrained(base)
            transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(base)
            if how:
                config = QuantizeConfig(group_size=32, desc_act=False, **how)
            else:
                config = AWQConfig(bits=4, group_size=32, sym=False, format=FORMAT.GEMM)
            model = GPTQModel.load(str(base), config, device="cpu", dtype=torch.float16)
            model.quantize(text, batch_size=4)
            model.save(str(Path(home) / name))
            loaded = GPTQModel.load(str(Path(home) / name), device="cpu", dtype=torch.float16, backend="torch")
            weights = {  # of AWQ its modules tell no weights
                path: dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).T
                if how is None
                else module.dequantize_weight().T
                for path, module in loaded.model.named_modules()
                if hasattr(module, "qweight")
            }
            floats = _model(torch, transformers, torch.float32, **sizes)
            floats.load_state_dict(  # AWQ scales what is before a matrix too
                {key: value for key, value in loaded.model.state_dict().items() if key in floats.state_dict()},
                strict=False,
            )
            _keep(torch, Path(home) / name, floats, weights)


EXPORTS = {  # name: (the config of tests.tiny or a golden, what matrices become, format)
    "w8a16": ("untied", {}, "compressed-tensors"),
    "w8a8": ("llama", {"activations": "int8"}, "compressed-tensors"),
    "w8a8_static": ("untied", {"activations": "int8"}, "compressed-tensors"),  # with the scale STATIC
    "w4a16": ("qwen2", {"bits": 4, "group": 16}, "compressed-tensors"),
    "w4a16_fused": ("neox", {"bits": 4, "group": 16}, "compressed-tensors"),
    "w8a16_qk_norm": ("qwen3", {}, "compressed-tensors"),
    "w8a16_experts": ("mixtral", {}, "compressed-tensors"),
    "w8a16_post_norm": ("gemma3", {}, "compressed-tensors"),
    "w3a16": ("llama", {"bits": 3, "group": 16}, "compressed-tensors"),
    "floats_of_w3a16": ("gpt2", {"bits": 3, "group": 16}, "huggingface"),
    "floats_of_w4a16_asym": ("neox", {"bits": 4, "group": 16, "symmetric": False}, "huggingface"),
}
ROUNDED = 0.1  # logits: compressed-tensors rounds activations to multiples of largest / 127.5, efflm and vLLM / 127


STATIC = 0.03


def export(folder: Path) -> None:
    import jax.numpy as jnp

    import efflm
    from efflm import trees
    from efflm.compress.quantize import quantize
    from efflm.formats import huggingface
    from tests import tiny
    from tests.formats.huggingface_test import small_tokenizer

    def static(_, w):
        known = {"activations": "int8_static", "activation_scale": jnp.full((1, 1), STATIC)}
        return w.replace(**known) if hasattr(w, "bits") else w

    for name, (config, how, format) in EXPORTS.items():
        golden = PACKED.parent / config
        model = tiny.model(tiny.CONFIGS[config]) if config in tiny.CONFIGS else huggingface.load_weights(golden)
        params = quantize(model.params, **how)
        if "static" in name:
            params = trees.map_with_path(static, params)
        efflm.save(folder / name, model.replace(params=params), small_tokenizer(), format=format)
        tokens = tiny.tokens(model.config, 2, LENGTH)
        logits = tiny.logits(huggingface.load_weights(folder / name), tokens)
        np.savez_compressed(folder / f"{name}.npz", tokens=tokens, logits=logits)


def check(folder: Path) -> None:
    import torch
    import transformers

    for name in sys.argv[3:] or EXPORTS:
        golden = np.load(folder / f"{name}.npz")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
        difference = float(np.abs(logits - golden["logits"]).max())
        print(f"{name}: {type(model).__name__}, logits differ by at most {difference:.1e}")
        assert difference < (ROUNDED if name == "w8a8" else 1e-4)


if __name__ == "__main__":
    run = {"compressed_tensors": compressed_tensors, "gptqmodel": gptqmodel, "export": export, "check": check}
    run[sys.argv[1]](*map(Path, sys.argv[2:3]))
