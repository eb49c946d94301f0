"""Self-attention of one layer, with or without a KV cache."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from efflm import ops
from efflm.config.model import BlockConfig, ModelConfig
from efflm.model.linear import PROBABILITIES, Linear, gathers, linears
from efflm.model.norms import Norm
from efflm.parallel import per_device, sequence_parallel, sharding
from efflm.precision import Policy


@flax.struct.dataclass
class LayerCache:
    """Keys and values [B, S, K, H] of one layer; slot s of a row holds its position s."""

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class Branches:
    """Sequences that share their beginnings, packed so that a token that several share is there once: it takes the
    place of segments. The layers read packed tokens, and only attention reads each sequence by itself.

    tokens_RS: int32, for each of R sequences which packed token stands at each of its S places; any where it has ended.
    places_BT: int32, for each packed token [B, T] one of the R * S places where it stands.
    """

    tokens_RS: jax.Array
    places_BT: jax.Array

    def attend(self, attention: Callable[..., jax.Array], *packed: jax.Array, **how: Any) -> jax.Array:
        """What `attention` gives of the sequences, as the tokens are packed. packed: queries, keys, values."""
        at = lambda x, index: jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, mode="clip")
        apart = (at(x, self.tokens_RS) for x in packed)
        return at(attention(*apart, None, **how), self.places_BT)


class Attention(nn.Module):
    """x [B, T, D], to be normalized, and the residual float32 [B, T, D] or None -> its sum with what attention gives,
    and the cache with this call's keys and values. rotary: ops.rotate's tables, or None."""

    config: ModelConfig
    block: BlockConfig
    policy: Policy

    @nn.compact
    def __call__(
        self,
        x: ops.Normed,
        residual_BTD: jax.Array | None,
        positions_BT: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        segments_BT: jax.Array | Branches | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        config, block, dtype = self.config, self.block, self.policy.compute
        layers = [Linear(config, name=name) for name in ("query", "key", "value")]
        split = lambda y_BTX: y_BTX.reshape(*x.shape[:2], -1, block.head_dim)
        q, k, v = linears(x, layers)
        normed = lambda q, k: (Norm(config, name="query_norm")(q), Norm(config, name="key_norm")(k))
        if config.qk_norm and config.qk_norm_whole:
            q, k = normed(q, k)
        q_BTNH, k_BTKH, v_BTKH = map(split, (q, k, v))
        if config.qk_norm and not config.qk_norm_whole:
            q_BTNH, k_BTKH = normed(q_BTNH, k_BTKH)
        if config.query_scalar:
            q_BTNH = q_BTNH * math.sqrt(block.head_dim / config.query_scalar)
        seen = {"window": block.window, "cap": config.score_cap}
        if cache is None:
            if rotary is not None:
                q_BTNH, k_BTKH = ops.rotate(q_BTNH, *rotary), ops.rotate(k_BTKH, *rotary)
            place = lambda x: sharding.constrain(x.astype(dtype), "batch", "length", "heads", None)
            q_BTNH, k_BTKH, v_BTKH = place(q_BTNH), place(k_BTKH), place(v_BTKH)
            if gathers(self, PROBABILITIES):
                self.sow(PROBABILITIES, "all", sequence_parallel.probabilities(q_BTNH, k_BTKH, segments_BT, **seen))
            attend = sequence_parallel.attention if sequence_parallel.is_sharded() else per_device.attention
            if isinstance(segments_BT, Branches):
                out_BTNH = segments_BT.attend(attend, q_BTNH, k_BTKH, v_BTKH, **seen)
            else:
                out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, **seen)
        else:
            place = lambda x: sharding.constrain(x, "batch", "length", "heads", None)
            out_BTNH, *buffers = ops.cached_attention(
                place(q_BTNH), place(k_BTKH), place(v_BTKH), cache.keys, cache.values, positions_BT, rotary,
                dtype=dtype, **seen, attend=per_device.attention, whole=sharding.is_whole(),
            )  # fmt: skip
            cache = LayerCache(*buffers)
        merged = out_BTNH.reshape(*x.shape[:2], -1).astype(dtype)
        return Linear(config, name="output")(merged, residual_BTD), cache
