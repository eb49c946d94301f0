"""Small models and batches that tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.config.model import BlockConfig, LinearScaling, ModelConfig, ModelShape, RopeScaling
from efflm.infer.generate import forward
from efflm.model import LanguageModel, init_params
from efflm.train import step

LLAMA = ModelShape(layers=2, width=32, heads=4, kv_heads=2, mlp_dim=48, vocabulary=300, max_length=64)
GPT2 = dataclasses.replace(LLAMA, family="gpt2", kv_heads=4)
UNTIED = dataclasses.replace(LLAMA, tied=False)
logits = jax.jit(
    lambda model, tokens, **inputs: forward(model, tokens, **inputs)[0]
)  # one program, not one an operation

SHAPES = {"llama": LLAMA, "gpt2": GPT2, "untied": UNTIED}
WINDOWED = BlockConfig(heads=4, kv_heads=2, head_dim=8, mlp_dim=48, window=5)
CONFIGS = {name: shape.config() for name, shape in SHAPES.items()} | {
    "qwen2": ModelConfig(  # with Mistral's window and Llama 3's scaling, whose three bands these four frequencies meet
        vocabulary=300,
        width=32,
        max_length=64,
        blocks=(WINDOWED,) * 2,
        qkv_bias=True,
        rope_base=100.0,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=0.5, high_freq_factor=1.5, original_max_length=24),
    ),
    "qwen3": ModelConfig(
        vocabulary=300,
        width=32,
        max_length=64,
        blocks=(BlockConfig(heads=4, kv_heads=2, head_dim=16, mlp_dim=48),) * 2,
        qk_norm=True,
        norm_epsilon=1e-6,
    ),
    "gemma": ModelConfig(  # Gemma 2's caps and Gemma 3's norms and bases; a layer of each kind
        vocabulary=300,
        width=32,
        max_length=64,
        blocks=(
            BlockConfig(heads=4, kv_heads=2, head_dim=8, mlp_dim=48, window=5),
            BlockConfig(heads=4, kv_heads=2, head_dim=8, mlp_dim=48),
        ),
        feedforward="geglu",
        qk_norm=True,
        post_norm=True,
        norm_offset=1.0,
        embedding_scale=32**0.5,
        query_scalar=12.0,
        score_cap=2.0,
        logit_cap=3.0,
        rope_base=1000.0,
        local_rope_base=100.0,
        rope_scaling=LinearScaling(factor=4.0),
    ),
    "neox": ModelConfig(
        vocabulary=300,
        width=32,
        max_length=64,
        blocks=(BlockConfig(heads=4, kv_heads=4, head_dim=8, mlp_dim=48),) * 2,
        norm="layer",
        feedforward="gelu_exact",
        bias=True,
        tied=False,
        parallel=True,
        rotary_fraction=0.5,
    ),
}

FAMILIES = CONFIGS | {
    "experts": ModelConfig(  # with OLMoE's norms, and shares that sum to 1
        vocabulary=300,
        width=32,
        max_length=64,
        blocks=(BlockConfig(heads=4, kv_heads=2, head_dim=8, mlp_dim=16, experts=4, experts_per_token=2),) * 2,
        qk_norm=True,
        qk_norm_whole=True,
        renormalized=True,
        tied=False,
    ),
}


def copies(tree):
    """A function that makes a copy of the tree, as training wants its starting weights."""
    return functools.partial(jax.tree.map, jnp.copy, tree)


def combination(*values):
    """A case of a parametrized test that combines what cases that run every time have separately."""
    return pytest.param(*values, marks=pytest.mark.combination)


def and_combinations(values, every_time) -> list:
    """All values, of which only those in `every_time` run every time."""
    return [value if value in every_time else combination(value) for value in values]


def model(shape: ModelShape | ModelConfig = LLAMA, seed: int = 0) -> LanguageModel:
    """A random model with nothing at its initial constant, so that no term of it can hide."""
    config = shape if isinstance(shape, ModelConfig) else shape.config()
    return LanguageModel(config, jax.tree.map(jnp.array, _weights(config, seed)))


@functools.cache
def _weights(config: ModelConfig, seed: int) -> dict:
    leaves, tree = jax.tree.flatten(init_params(config, seed))
    rng = np.random.default_rng(seed)
    moved = [np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocabulary, (batch, length)).astype(np.int32)


def batch(config: ModelConfig, rows: int = 8, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Two packed documents a row and some padding at the end."""
    ids = tokens(config, rows, length + 1, seed)
    first, second = length // 2, length - length // 2 - 2
    segments = np.tile(np.repeat([1, 2, 0], [first, second, 2]), (rows, 1)).astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(second), np.arange(2)])
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": segments,
        "positions": np.tile(positions, (rows, 1)).astype(np.int32),
    }


MEASURED = {"seconds", "tokens_per_second", "step_seconds", "flop_utilization", "process_bytes", "device_bytes"}


def repeatable(line):
    """What of a line of metrics the same run writes again: not what the clock and the memory say."""
    return {name: value for name, value in line.items() if name not in MEASURED}


def init_state(trainable, optimizer, mesh, loss_scale=None, masks=None):
    """A state on the mesh, its optimizer moments sharded like the weights. The given arrays are copied, not donated."""
    like = step.abstract_state(trainable, optimizer, mesh, loss_scale, masks)
    return step.make_init(optimizer, like)(jax.tree.map(jnp.copy, trainable), loss_scale, masks)
