"""Small random models of every family as transformers writes them and what it computes with them; and the way back.

    PEER tests/formats/make_goldens.py make [NAMES]       # writes tests/formats/goldens, checked in
    python -m tests.formats.make_goldens export FOLDER    # efflm reads these, and writes them into FOLDER
    PEER tests/formats/make_goldens.py check FOLDER       # transformers loads that unchanged; logits within 1e-4

PEER is a Python with torch and transformers (made with 5.23.0 and 5.24.0), which neither efflm nor its tests import.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
LENGTH = 40  # of the rows: beyond every window and every original length below
LLAMA = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.2}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"} | {"hidden_size": 32}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 7}
CAPPED = {"final_logit_softcapping": 1.5}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {  # name: (family, settings)
    "llama": ("Llama", LLAMA | {"rms_norm_eps": 1e-5, "rope_theta": 5e4, "tie_word_embeddings": True}),
    "llama3": ("Llama", LLAMA | {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": STRETCHED}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "qwen2": ("Qwen2", LLAMA | {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | {"n_inner": 24, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoX", NEOX | {"rotary_pct": 0.25, "rotary_emb_base": 100}),
    "gpt_neox_serial": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    ),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0} | CAPPED),
    "gemma2_uncapped": ("Gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 3, "sliding_window_pattern": 3, "rope_theta": 1e5}),
    "gemma3_scaled": (
        "Gemma3",
        GEMMA
        | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_local_base_freq": 100.0}
        | CAPPED
        | {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 10},
    ),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4, "intermediate_size": 12, "sliding_window": 9}),
    "qwen3_moe": (
        "Qwen3Moe",
        LLAMA
        | {"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
        | {"norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12}),
    "llama_linear": ("Llama", LLAMA | {"num_hidden_layers": 1, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama_dynamic": (
        "Llama",
        LLAMA | {"num_hidden_layers": 1, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama_yarn": ("Llama", LLAMA | {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": YARN}),
    "qwen3_yarn": (
        "Qwen3",
        LLAMA
        | {"head_dim": 16, "rope_theta": 100.0}
        | {"rope_scaling": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
IN_SHARDS = ("qwen3",)


def make(*names: Path) -> None:
    import torch
    import transformers

    for seed, (name, (family, settings)) in enumerate(MODELS.items()):
        if names and Path(name) not in names:
            continue
        shutil.rmtree(GOLDENS / name, ignore_errors=True)
        torch.manual_seed(seed)
        config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
        architecture = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
        model = architecture._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for weight in model.parameters():  # nothing at its initial constant, so that no term can hide
                weight.copy_((weight == 1).all() + 0.3 * torch.randn_like(weight))
            tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
            logits = model(tokens).logits
        model.save_pretrained(GOLDENS / name, max_shard_size=12_000 if name in IN_SHARDS else "1GB")
        (GOLDENS / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(GOLDENS / f"{name}.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
        print(name, float(logits.abs().max()))


def export(folder: Path) -> None:
    from efflm.formats import huggingface
    from tests.formats import huggingface_test

    for name in MODELS:
        huggingface.save(folder / name, huggingface.load_weights(GOLDENS / name), huggingface_test.small_tokenizer())


def check(folder: Path) -> None:
    import torch
    import transformers

    for name in MODELS:
        golden = np.load(GOLDENS / f"{name}.npz")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        text = "the cat sat, on the mat."
        assert tokenizer.eos_token == "<end>"
        if MODELS[name][0] != "Qwen2":  # whatever its files say, transformers 5 gives these Qwen's own byte-level one
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        with torch.no_grad():
            logits = model(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
        difference = float(np.abs(logits - golden["logits"]).max())
        print(f"{name}: {type(model).__name__}, logits differ by at most {difference:.1e}")
        assert difference < 1e-4


if __name__ == "__main__":
    {"make": make, "export": export, "check": check}[sys.argv[1]](*map(Path, sys.argv[2:]))
