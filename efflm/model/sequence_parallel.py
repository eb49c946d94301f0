"""Sequence parallelism: each row spread over the devices of the mesh axis `sequence`, attention exact.

Everything but attention is a function of one token, so each device computes on its own tokens as if they were whole
rows (`spread`). For attention it gathers the keys and values of all, and its own queries see those up to their slots:
what travels is keys and values, which grouped heads make small (Llama 3, Dubey 2024, arXiv 2407.21783, section 3.3.2).
A causal query sees more the later it stands, so a device takes one stretch from the front and one from the back, and
all have the same number of pairs: of 2C stretches, device i has the i-th and the (2C - 1 - i)-th.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from efflm import ops
from efflm.model import sharding

AXIS = "sequence"


def is_spread() -> bool:
    """Whether what is being traced is the part of one device of the axis."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def spread(sums: Callable[[Any, Any], Any], params: Any, batch: dict[str, jax.Array]) -> Any:
    """sums(params, batch), a tree of sums over the tokens of batch arrays [B, T], each device summing its own tokens.

    `attention` finds out where they are; positions and segments must be in the batch. T must be a multiple of 2C.
    """
    shards = sharding.sequence_shards()
    if shards == 1:
        return sums(params, batch)

    def of_one(params, batch):
        return jax.tree.map(lambda total: total[None], sums(params, batch))

    each = jax.shard_map(
        of_one,
        in_specs=(PartitionSpec(), PartitionSpec(None, AXIS)),
        out_specs=PartitionSpec(AXIS),
        axis_names={AXIS},
        check_vma=False,
    )(params, jax.tree.map(lambda x: _stretches(x, _order(shards)), batch))
    return jax.tree.map(lambda totals: jnp.sum(totals, axis=0), each)


def _order(shards: int) -> list[int]:
    """Which stretch lies where once all devices' tokens are side by side: 0, 2C - 1, 1, 2C - 2, ..."""
    return [stretch for i in range(shards) for stretch in (i, 2 * shards - 1 - i)]


def _stretches(x: jax.Array, order: list[int]) -> jax.Array:
    """x [B, T, ...] with its len(order) stretches along T in another order."""
    parts = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([parts[stretch] for stretch in order], axis=1)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int
) -> jax.Array:
    """Of one device's queries and all devices' keys and values -> float32 [B, T, N, H]; T tokens are its own."""
    shards, T = sharding.sequence_shards(), q_BTNH.shape[1]
    order = _order(shards)
    place = [order.index(stretch) for stretch in range(2 * shards)]
    whole = lambda x: _stretches(lax.all_gather(x, AXIS, axis=1, tiled=True), place)
    device, half = lax.axis_index(AXIS), jnp.arange(T // 2, dtype=jnp.int32)
    slots_T = jnp.concatenate([device * (T // 2) + half, (2 * shards - 1 - device) * (T // 2) + half])
    return ops.attention(
        q_BTNH,
        whole(k_BTKH),
        whole(v_BTKH),
        slots_BT=slots_T[None],
        segments_BT=segments_BT,
        key_segments_BS=None if segments_BT is None else whole(segments_BT),
        window=window,
    )
