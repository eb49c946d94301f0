"""A decoder-only Transformer that covers the families of models by its config, and the model as a value."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.config import require
from efflm.config.model import BlockConfig, ModelConfig
from efflm.config.train import REMAT, Remat
from efflm.model import placement
from efflm.model.attention import Attention, Branches, LayerCache
from efflm.model.experts import Experts
from efflm.model.feedforward import FeedForward
from efflm.model.linear import OUTPUTS, PROBABILITIES, fetch, gathers
from efflm.model.norms import Norm
from efflm.model.params import STACK
from efflm.model.rotary import of_layers as rotary_tables
from efflm.ops import qarray
from efflm.ops.recompute import late
from efflm.parallel.sharding import constrain
from efflm.precision import Policy


@flax.struct.dataclass
class LanguageModel:
    """A model is a value: what it is, its weights, and the masks of pruned weights (ops.masks).

    about: what is known of where it is from (see formats.sources.Loaded). That is no part of the value: whatever is
    made of a model, by a transformation of JAX or by `replace`, begins without it.
    """

    config: ModelConfig = flax.struct.field(pytree_node=False)
    params: Any
    masks: ops.Masks = None
    about: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def with_about(self, about: Mapping[str, Any]) -> "LanguageModel":
        """The same model, and what is known of it."""
        known = self.replace()
        object.__setattr__(known, "about", MappingProxyType(dict(about)))
        return known


def require_same_tokenizer(other: LanguageModel, model: LanguageModel, name: str, whose: str) -> None:
    """Raise InputError if it is known of both models which token each id is, or else which tokenizer they have, and it
    is not the same, or if their vocabularies, without padding, have different sizes. name: of the first, as in
    "teacher"; whose: of the second."""
    known = [key for key in ("token_ids", "tokenizer") if other.about.get(key) and model.about.get(key)]
    theirs, ours = (each.about[known[0]] if known else None for each in (other, model))
    require(
        theirs == ours,
        f"the {name}'s tokenizer is {theirs!r:.20}, the {whose}'s {ours!r:.20}: give a {name} that has the {whose}'s",
    )
    require(
        other.config.tokens == model.config.tokens,
        f"the {name}'s vocabulary is {other.config.tokens}, the {whose}'s {model.config.tokens}, without padding: give "
        f"a {name} that has the {whose}'s tokenizer",
    )


def in_dtype(model: LanguageModel, dtype: str) -> LanguageModel:
    """The model with its floating-point arrays in `dtype`; its matmuls are in bfloat16 if that is it, else float32.

    Raises InputError where a number does not fit.
    """
    config = dataclasses.replace(model.config, precision="bfloat16" if dtype == "bfloat16" else "float32")
    made = jax.tree.map(functools.partial(qarray.in_dtype, dtype=dtype), model.params, is_leaf=trees.is_leaf)
    for (path, before), (_, after) in zip(trees.flatten(model.params, inside=True), trees.flatten(made, inside=True)):
        if after.dtype != before.dtype:
            require_fits(path, before, after)
    return model.replace(config=config, params=made)


def require_fits(name: str, before: Any, after: Any) -> None:
    """Raise InputError if a finite number of a weight is infinite in `after`, the same weight in another dtype."""
    require(
        not trees.overflowed(before, after),
        f"{name} has numbers beyond {jnp.finfo(after.dtype).max:.3g}, the largest of {after.dtype.name}: "
        + (
            "choose the dtype bfloat16 or float32"
            if after.dtype == jnp.float16
            else "no dtype that models are held in has them"
        ),
    )


@flax.struct.dataclass
class Cache:
    """The KV cache: a LayerCache for each layer, and how many positions of each sequence are filled, int32 [B]."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of `length` positions."""
    layers = []
    for block in config.blocks:
        shape = (batch, length, block.kv_heads, block.head_dim)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return Cache(tuple(layers), jnp.zeros(batch, jnp.int32))


class Block(nn.Module):
    """Pre-norm residual layer, with post_norm normed before each sum too. The residual stream is float32; the operands
    of matmuls are in the compute dtype."""

    config: ModelConfig
    block: BlockConfig
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD, positions_BT, rotary, segments_BT, cache=None):
        config, block, policy = self.config, self.block, self.policy
        norm = lambda name, x: Norm(config, policy.compute, name=name).of(x)
        residual = lambda x: None if config.post_norm else x
        added = lambda name, x, y: x + Norm(config, name=name)(y) if config.post_norm else y
        middle_BTD, cache = Attention(config, block, policy, name="attention")(
            norm("attention_norm", x_BTD), residual(x_BTD), positions_BT, rotary, segments_BT, cache
        )
        middle_BTD = added("attention_post_norm", x_BTD, middle_BTD)
        read_BTD = x_BTD if config.parallel else middle_BTD
        part = (
            Experts(config, block, policy, name="feedforward")
            if block.experts
            else FeedForward(config, policy, name="feedforward")
        )
        x_BTD = part(norm("feedforward_norm", read_BTD), residual(middle_BTD))
        x_BTD = added("feedforward_post_norm", middle_BTD, x_BTD)
        return constrain(x_BTD, "batch", "length", None), cache


def _recomputed_late(layer: nn.Module, x_BTD: jax.Array, positions_BT: jax.Array, rotary: Any, segments_BT: Any):
    """layer(x) -> [B, T, D], whose backward pass recomputes the layer once the gradient is there (see recompute.late).

    jax.checkpoint alone uses optimization barriers, which XLA's CPU compiler drops: it would store everything.
    """
    call = lambda layer, x: layer(x, positions_BT, rotary, segments_BT)[0]

    def backward(pull, gradient):
        activation = lambda x: x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: late(x, gradient) if activation(x) else x, pull)(gradient)

    return nn.custom_vjp(call, lambda layer, x: nn.vjp(call, layer, x), backward)(layer, x_BTD)


def _width_gathered(table: Any, rows: str | None) -> Any:
    """A table [rows, D], its width on every device before a lookup: tokens are spread over the same devices."""
    return jax.tree.map(lambda part: constrain(part, rows, None), table)


class Transformer(nn.Module):
    """tokens [B, T] -> (logits [B, T, V] in the policy's output dtype, the cache after them or None).

    segments: integers that tell apart the documents packed into a sequence; a token attends within its own document. Or
    Branches: sequences that share their beginnings, whose positions must be given.
    positions: default 0, 1, 2, ... or, with a cache, onwards from each sequence's length. With a cache, which must have
    T more free positions, segments are not supported. `scanned` reads equal layers stacked in one leading axis (see
    stack_blocks) and supports no cache. `remat` is a name in REMAT.
    """

    config: ModelConfig
    policy: Policy = Policy()
    scanned: bool = False
    remat: Remat = "none"

    def setup(self):
        self.embedding = fetch(self, self.config, "embedding")
        self.position_embedding = fetch(self, self.config, "position_embedding")
        self.unembedding = fetch(self, self.config, "unembedding")

    def __call__(self, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Cache | None]:
        x_BTD, cache = self.final_states(tokens, **inputs)
        return self.unembed(x_BTD), cache

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """The logits [B, T, V] of the final states, in the policy's output dtype."""
        logits = ops.unembed(x_BTD, self.embedding) if self.config.tied else ops.dot(x_BTD, self.unembedding)
        return ops.soft_cap(logits, self.config.logit_cap).astype(self.policy.output)

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The input of the first layer, float32 [B, T, D], for tokens and positions [B, T]."""
        x_BTD = ops.embed(_width_gathered(self.embedding, "vocabulary"), tokens, jnp.float32)
        if self.config.embedding_scale != 1:  # rounded to the compute dtype, as Gemma was trained with it
            scale = jnp.asarray(self.config.embedding_scale, self.policy.compute)
            x_BTD = x_BTD * scale.astype(jnp.float32)
        if self.config.position == "learned":
            x_BTD = x_BTD + ops.embed(_width_gathered(self.position_embedding, None), positions, jnp.float32)
        return constrain(x_BTD, "batch", "length", None)

    @nn.compact
    def final_states(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | Branches | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The input of the output layer: the last layer's output after the final norm, [B, T, D], compute dtype."""
        config, policy = self.config, self.policy
        B, T = tokens.shape
        if positions is None:
            start_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length_B
            positions = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        x_BTD = self.embedded(tokens, positions)
        rotary = rotary_tables(positions, config)
        stored = REMAT[self.remat].stored
        policy_of = jax.checkpoint_policies.save_only_these_names
        block_type = Block if stored is None else nn.remat(Block, policy=policy_of(*stored))
        if self.scanned:
            for first, count in runs(config):
                x_BTD = self._scan(block_type, first, count, x_BTD, positions, rotary[first], segments)
        else:
            layers = []
            for i, block in enumerate(config.blocks):
                layer = block_type(config, block, policy, name=f"block_{i}")
                # A derivative of our own has none of what a layer sows.
                if stored is None or gathers(self, PROBABILITIES):
                    x_BTD, layer_cache = layer(
                        x_BTD, positions, rotary[i], segments, cache.layers[i] if cache else None
                    )
                    layers.append(layer_cache)
                else:
                    x_BTD = _recomputed_late(layer, x_BTD, positions, rotary[i], segments)
                if gathers(self, OUTPUTS):
                    self.sow(OUTPUTS, "blocks", x_BTD)
            cache = Cache(tuple(layers), cache.length_B + T) if cache else None
        return Norm(config, policy.compute, name="final_norm")(x_BTD), cache

    def _scan(self, block_type, first, count, x_BTD, positions_BT, rotary, segments_BT):
        config = self.config
        layers = nn.scan(
            block_type,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=count,
        )(config, config.blocks[first], self.policy, name=f"{STACK}{first}")
        return layers(x_BTD, positions_BT, rotary, segments_BT)[0]


@flax.struct.dataclass
class Gathered:
    """What the layers gave, in their order: outputs before the final norm, float32 [B, T, D], and the weights of
    attention, float32 [B, N, T, S]. Empty where it was not asked for."""

    outputs: tuple[jax.Array, ...] = ()
    probabilities: tuple[jax.Array, ...] = ()


def final_states_and_gathered(
    model: Transformer, params: Any, tokens: jax.Array, *, outputs: bool = True, probabilities: bool = False, **inputs
) -> tuple[jax.Array, Gathered]:
    """`final_states` without a cache, and what is asked for of every layer, which must then not be scanned."""
    wanted = [name for name, asked in ((OUTPUTS, outputs), (PROBABILITIES, probabilities)) if asked]
    (x_BTD, _), found = model.apply(
        {"params": params}, tokens, **inputs, method=Transformer.final_states, mutable=wanted
    )
    layers = range(len(model.config.blocks))
    return x_BTD, Gathered(
        found[OUTPUTS]["blocks"] if outputs else (),
        tuple(found[PROBABILITIES][f"block_{i}"]["attention"]["all"][0] for i in layers) if probabilities else (),
    )


def init_params(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """Random float32 weights, which depend on config and seed alone; on a mesh each device makes only its own part."""
    make, key = functools.partial(_init, config), jax.random.key(seed)
    if mesh is None:
        return make(key)
    return jax.jit(make, out_shardings=placement.shardings(jax.eval_shape(make, key), mesh))(key)


@functools.partial(jax.jit, static_argnames="config")  # traced once a config
def _init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def runs(config: ModelConfig) -> list[tuple[int, int]]:
    """(first layer, how many) of each run of layers of the same shape."""
    starts = [i for i, block in enumerate(config.blocks) if i == 0 or block != config.blocks[i - 1]]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(config.blocks)], strict=True)]


def stack_blocks(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """block_0, block_1, ... as a subtree with a leading layer axis for each run of equal layers: blocks_0, and where
    layers differ others, named after the first layer of the run."""
    out = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    for first, count in runs(config):
        blocks = [params[f"block_{i}"] for i in range(first, first + count)]
        out[f"{STACK}{first}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return out


def unstack_blocks(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    out = {name: leaf for name, leaf in params.items() if not name.startswith(STACK)}
    for first, count in runs(config):
        stack = params[f"{STACK}{first}"]
        out |= {f"block_{first + i}": jax.tree.map(operator.itemgetter(i), stack) for i in range(count)}
    return out
