"""Published models by name, as configs without weights.

Sources, all read from `config.json` of the named model card on huggingface.co, and held in a test against the parameter
counts their authors publish: Llama 3 (arXiv 2407.21783, table 3), Llama 3.2, SmolLM2 (arXiv 2502.02737), Gemma 3 (arXiv
2503.19786), GPT-2 (Radford 2019, table 2; the counts are those of the released weights).
"""

import dataclasses

from efflm.config import InputError
from efflm.config.model import BlockConfig, ModelConfig, RopeScaling

LLAMA_3_2 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)


def _llama(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp_dim: int,
    *,
    vocabulary: int = 128_256,
    max_length: int = 8192,
    tied: bool = False,
    rope_base: float = 500_000.0,
    rope_scaling: RopeScaling | None = None,
) -> ModelConfig:
    block = BlockConfig(heads=heads, kv_heads=kv_heads, head_dim=width // heads, mlp_dim=mlp_dim)
    return ModelConfig(
        vocabulary=vocabulary,
        width=width,
        max_length=max_length,
        blocks=(block,) * layers,
        tied=tied,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
    )


def _smollm2(layers: int, width: int, heads: int, kv_heads: int, mlp_dim: int, base: float = 100_000.0) -> ModelConfig:
    return _llama(layers, width, heads, kv_heads, mlp_dim, vocabulary=49_152, tied=True, rope_base=base)


def _gpt2(layers: int, width: int, heads: int) -> ModelConfig:
    block = BlockConfig(heads=heads, kv_heads=heads, head_dim=width // heads, mlp_dim=4 * width)
    return ModelConfig(
        vocabulary=50_257,
        width=width,
        max_length=1024,
        blocks=(block,) * layers,
        norm="layer",
        position="learned",
        feedforward="gelu",
        bias=True,
    )


def _gemma3(layers: int, width: int, heads: int, mlp_dim: int) -> ModelConfig:
    block = BlockConfig(heads=heads, kv_heads=1, head_dim=256, mlp_dim=mlp_dim)
    return ModelConfig(
        vocabulary=262_144,
        width=width,
        max_length=32_768,
        blocks=tuple(dataclasses.replace(block, window=512 * ((i + 1) % 6 > 0)) for i in range(layers)),
        feedforward="geglu",
        qk_norm=True,
        post_norm=True,
        norm_offset=1.0,
        embedding_scale=width**0.5,
        query_scalar=256.0,
        rope_base=1e6,
        local_rope_base=1e4,
        norm_epsilon=1e-6,
    )


PRESETS: dict[str, ModelConfig] = {
    "llama3-8b": _llama(32, 4096, 32, 8, 14_336),
    "llama3-70b": _llama(80, 8192, 64, 8, 28_672),
    "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, max_length=131_072, tied=True, rope_scaling=LLAMA_3_2),
    "llama3.2-3b": _llama(28, 3072, 24, 8, 8192, max_length=131_072, tied=True, rope_scaling=LLAMA_3_2),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, 130_000.0),
    "gemma3-270m": _gemma3(18, 640, 4, 2048),
    "gemma3-1b": _gemma3(26, 1152, 4, 6912),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}


def preset(name: str) -> ModelConfig:
    """The config of the published model `name`. Raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"no model is named {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
