"""Self-attention of one layer, with or without a KV cache."""

import flax.linen as nn
import flax.struct
import jax
from jax import lax

from efflm.config import BlockConfig, ModelConfig
from efflm.model import per_device, sequence_parallel, sharding
from efflm.model.linear import Linear
from efflm.model.norms import Norm
from efflm.model.rotary import rotate
from efflm.precision import Policy


@flax.struct.dataclass
class LayerCache:
    """Keys and values [B, S, K, H] of one layer; slot s of a row holds its position s."""

    keys: jax.Array
    values: jax.Array


def _write(buffer_BSKH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array) -> jax.Array:
    write_row = lambda row, new, start: lax.dynamic_update_slice(row, new, (start, 0, 0))
    return jax.vmap(write_row)(buffer_BSKH, new_BTKH.astype(buffer_BSKH.dtype), start_B)


class Attention(nn.Module):
    """x_BTD in the compute dtype -> (float32 [B, T, D], the cache with this call's keys and values)."""

    config: ModelConfig
    block: BlockConfig
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        config, block, dtype = self.config, self.block, self.policy.compute

        def project(name: str) -> jax.Array:
            return Linear(config, name=name)(x_BTD).reshape(*x_BTD.shape[:2], -1, block.head_dim)

        q_BTNH, k_BTKH, v_BTKH = project("query"), project("key"), project("value")
        if config.qk_norm:
            q_BTNH = Norm(config, name="query_norm")(q_BTNH)
            k_BTKH = Norm(config, name="key_norm")(k_BTKH)
        if config.position == "rotary":
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, config), rotate(k_BTKH, positions_BT, config)
        place = lambda x: sharding.constrain(x.astype(dtype), "batch", "length", "heads", None)
        q_BTNH, k_BTKH, v_BTKH = place(q_BTNH), place(k_BTKH), place(v_BTKH)
        if cache is None and sequence_parallel.is_sharded():
            out_BTNH = sequence_parallel.attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, block.window)
        elif cache is None:
            out_BTNH = per_device.attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=block.window)
        else:
            start_B = positions_BT[:, 0]
            cache = LayerCache(_write(cache.keys, k_BTKH, start_B), _write(cache.values, v_BTKH, start_B))
            k_BSKH, v_BSKH = cache.keys.astype(dtype), cache.values.astype(dtype)
            out_BTNH = per_device.attention(q_BTNH, k_BSKH, v_BSKH, None, slots_BT=positions_BT, window=block.window)
        merged = out_BTNH.reshape(*x_BTD.shape[:2], -1).astype(dtype)
        return Linear(config, name="output")(merged), cache
