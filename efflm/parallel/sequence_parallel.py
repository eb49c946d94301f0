"""Sequence parallelism: every sequence is split over the devices of the mesh axis `sequence`; attention is exact.

Everything but attention acts on one token at a time, so each device computes on its own tokens as if they were whole
sequences (`summed_over_shards`). For attention, each device all-gathers keys and values, and its own queries attend to
those up to their positions (Llama 3, Dubey 2024, arXiv 2407.21783, section 3.3.2): grouped heads make these small.
A later causal query attends to more keys. So that all devices have the same number of pairs, a sequence is cut into 2C
chunks for C devices, and device i has chunks i and 2C - 1 - i.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from efflm import ops
from efflm.ops.attention import KERNELS, kernel_for
from efflm.ops.kernels import Attention
from efflm.parallel import per_device, sharding

AXIS = "sequence"
HIDDEN = -1  # a segment that no token is in


def is_sharded() -> bool:
    """Whether the computation being traced is that of one device along the axis, inside `summed_over_shards`."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def summed_over_shards(sums: Callable[[Any, Any, Any, jax.Array], Any]) -> Callable[[Any, Any, Any, jax.Array], Any]:
    """sums(trainable, frozen, batch, weights_BT), a tree of sums over the tokens of a batch of arrays [B, T], as a
    function in which each device sums over its own tokens; `sums` itself where sequences are whole.

    The batch must hold positions and segments, since a device's tokens are not contiguous. T must be a multiple of 2C.
    """
    shards = sharding.sequence_shards()
    if shards == 1:
        return sums

    def of_one(*given):
        return jax.tree.map(lambda total: total[None], sums(*given))

    tokens = PartitionSpec(None, AXIS)
    of_each = jax.shard_map(
        of_one,
        in_specs=(PartitionSpec(), PartitionSpec(), tokens, tokens),
        out_specs=PartitionSpec(AXIS),
        axis_names={AXIS},
        check_vma=False,
    )

    def summed(trainable, frozen, *of_tokens):
        each = of_each(trainable, frozen, *jax.tree.map(lambda x: _reordered(x, _chunk_order(shards)), of_tokens))
        return jax.tree.map(lambda totals: jnp.sum(totals, axis=0), each)

    return summed


def _chunk_order(shards: int) -> list[int]:
    """The chunks of all devices, device by device: 0, 2C - 1, 1, 2C - 2, ..."""
    return [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]


def _reordered(x: jax.Array, order: list[int]) -> jax.Array:
    """x [B, T, ...] with its len(order) chunks along T in another order."""
    chunks = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([chunks[i] for i in order], axis=1)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    cap: float = 0.0,
) -> jax.Array:
    """Of one device's queries and all devices' keys and values -> float32 [B, T, N, H]; T tokens are its own."""
    shards, (T, H), dtype = sharding.sequence_shards(), q_BTNH.shape[1::2], q_BTNH.dtype
    order = _chunk_order(shards)
    place = [order.index(stretch) for stretch in range(2 * shards)]
    whole = lambda x: None if x is None else _reordered(lax.all_gather(x, AXIS, axis=1, tiled=True), place)
    device = lax.axis_index(AXIS)
    arguments = (q_BTNH, whole(k_BTKH), whole(v_BTKH), segments_BT, whole(segments_BT), device)
    by_slots = functools.partial(_by_slots, shards=shards, window=window, cap=cap)
    by_stretches = functools.partial(_by_stretches, shards=shards, window=window)
    # The stretch in front sees half of the keys at most.
    lengths = [(T // 2, shards * T // 2), (T // 2, shards * T)]
    takes = lambda name, *call: kernel_for(name, Attention(*call, own_segments=False, cap=cap)) is not None
    in_order = lambda name: all(takes(name, *each, H, dtype, window) for each in lengths)
    slots = lambda name: takes(name, T, shards * T, H, dtype, window, False)
    kernels = {name: by_stretches for name in KERNELS if in_order(name) and not slots(name)}
    return lax.platform_dependent(*arguments, default=by_slots, **kernels) if kernels else by_slots(*arguments)


def probabilities(
    q_BTNH: jax.Array, k_BTKH: jax.Array, segments_BT: jax.Array | None, window: int, cap: float = 0.0
) -> jax.Array:
    """ops.attention_probabilities of a device's own queries: float32 [B, N, T, S]. Where a sequence is split over
    devices, its keys are in the order of the devices that have them."""
    T = q_BTNH.shape[1]
    if not is_sharded():
        slots_T, whole = jnp.arange(T), lambda x: x
        key_slots_S = slots_T
    else:
        shards = sharding.sequence_shards()
        slots = jnp.split(_reordered(jnp.arange(shards * T)[None], _chunk_order(shards))[0], shards)
        whole = lambda x: None if x is None else lax.all_gather(x, AXIS, axis=1, tiled=True)
        slots_T, key_slots_S = jnp.stack(slots)[lax.axis_index(AXIS)], jnp.concatenate(slots)
    return ops.attention_probabilities(
        q_BTNH,
        whole(k_BTKH),
        slots_T=slots_T,
        key_slots_S=key_slots_S,
        segments_BT=segments_BT,
        key_segments_BS=whole(segments_BT),
        window=window,
        cap=cap,
    )


def _by_slots(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, device, *, shards: int, window: int, cap: float):
    """The portable form, and kernels that take slots: they compute just the keys that the slots of queries reach."""
    half_T = jnp.arange(q_BTNH.shape[1] // 2, dtype=jnp.int32)
    slots_T = jnp.concatenate([stretch * len(half_T) + half_T for stretch in (device, 2 * shards - 1 - device)])
    return per_device.attention(
        q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, slots_BT=slots_T[None], window=window, cap=cap
    )


def _by_stretches(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, device, *, shards: int, window: int):
    """For other kernels, whose masks are the same on every device: keys are rotated until a stretch's own are the last.

    The keys that come after it then stand first: they are hidden by a segment that no query is in.
    """
    B, T = q_BTNH.shape[:2]
    S, half = k_BSKH.shape[1], T // 2
    if segments_BT is None:
        segments_BT, key_segments_BS = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    outs = []
    for queries, keys, stretch in ((slice(half), S // 2, device), (slice(half, T), S, 2 * shards - 1 - device)):
        later = keys - (stretch + 1) * half  # keys that come after the stretch
        rotated = lambda x, keys=keys, later=later: jnp.roll(x[:, :keys], later, axis=1)
        key_segments = jnp.where(jnp.arange(keys)[None] < later, HIDDEN, rotated(key_segments_BS))
        out = per_device.attention(
            q_BTNH[:, queries], rotated(k_BSKH), rotated(v_BSKH), segments_BT[:, queries], key_segments, window=window
        )
        outs.append(out)
    return jnp.concatenate(outs, axis=1)
