"""A model one layer at a time, and what its linear layers read."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from efflm.config.model import ModelConfig
from efflm.model.linear import READ
from efflm.model.norms import Norm
from efflm.model.rotary import of_layers as rotary_tables
from efflm.model.transformer import Block, LanguageModel, Transformer
from efflm.precision import policy_for


class _Single(nn.Module):
    """The one layer of a config that has one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT):
        (block,) = self.config.blocks
        (rotary,) = rotary_tables(positions_BT, self.config)
        return Block(self.config, block, policy_for(self.config), name="block_0")(
            x_BTD, positions_BT, rotary, segments_BT
        )[0]


class _Last(nn.Module):
    """What comes after the layers, up to the output layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        return Norm(self.config, policy_for(self.config).compute, name="final_norm")(x_BTD)


def block_config(config: ModelConfig, index: int) -> ModelConfig:
    """The config of a model whose only layer is this one; equal for equal layers."""
    return dataclasses.replace(config, blocks=(config.blocks[index],))


def embed(model: LanguageModel, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The input of the first layer, float32 [B, T, D]."""
    transformer = Transformer(model.config, policy_for(model.config))
    return transformer.apply({"params": model.params}, tokens_BT, positions_BT, method="embedded")


def apply_block(
    single: ModelConfig, params: Any, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """The output [B, T, D] of a layer. single: its `block_config`; params: its weights, without `block_i`."""
    return _Single(single).apply({"params": {"block_0": params}}, x_BTD, positions_BT, segments_BT)


def final_states(config: ModelConfig, params: Any, x_BTD: jax.Array) -> jax.Array:
    """The input of the output layer, [B, T, D], for the output of the last layer. params: of the model."""
    return _Last(config).apply({"params": {"final_norm": params["final_norm"]}}, x_BTD)


def reads(
    single: ModelConfig, params: Any, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> dict[str, jax.Array]:
    """{path in the layer of each weight of a linear layer: what it reads, [B, T, in]}.

    Layers that read the same thing, as query, key and value do, have the very same array.
    """
    _, gathered = _Single(single).apply(
        {"params": {"block_0": params}}, x_BTD, positions_BT, segments_BT, mutable=[READ]
    )
    is_sown = lambda node: isinstance(node, tuple)
    flat, _ = jax.tree_util.tree_flatten_with_path(gathered[READ]["block_0"], is_leaf=is_sown)
    return {"/".join(key.key for key in path): sown[0] for path, sown in flat}
