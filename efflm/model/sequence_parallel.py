"""Sequence parallelism: every sequence is split over the devices of the mesh axis `sequence`; attention is exact.

Everything but attention acts on one token at a time, so each device computes on its own tokens as if they were whole
sequences (`sum_over_shards`). For attention, each device all-gathers keys and values, and its own queries attend to
those up to their positions (Llama 3, Dubey 2024, arXiv 2407.21783, section 3.3.2): grouped heads make these small.
A later causal query attends to more keys. So that all devices have the same number of pairs, a sequence is cut into 2C
chunks for C devices, and device i has chunks i and 2C - 1 - i.
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


def is_sharded() -> bool:
    """Whether the computation being traced is that of one device along the axis, inside `sum_over_shards`."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def sum_over_shards(sums: Callable[[Any, Any], Any], params: Any, batch: dict[str, jax.Array]) -> Any:
    """sums(params, batch), a tree of sums over the tokens of batch arrays [B, T]: each device sums over its own tokens.

    The batch must hold positions and segments, since a device's tokens are not contiguous. T must be a multiple of 2C.
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
    )(params, jax.tree.map(lambda x: _reordered(x, _chunk_order(shards)), batch))
    return jax.tree.map(lambda totals: jnp.sum(totals, axis=0), each)


def _chunk_order(shards: int) -> list[int]:
    """The chunks of all devices, device by device: 0, 2C - 1, 1, 2C - 2, ..."""
    return [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]


def _reordered(x: jax.Array, order: list[int]) -> jax.Array:
    """x [B, T, ...] with its len(order) chunks along T in another order."""
    chunks = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([chunks[i] for i in order], axis=1)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int
) -> jax.Array:
    """One device's T queries, with the keys and values of all devices -> float32 [B, T, N, H]."""
    shards, T = sharding.sequence_shards(), q_BTNH.shape[1]
    order = _chunk_order(shards)
    inverse = [order.index(chunk) for chunk in range(2 * shards)]
    whole = lambda x: _reordered(lax.all_gather(x, AXIS, axis=1, tiled=True), inverse)
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
