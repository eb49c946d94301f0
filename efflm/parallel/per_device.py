"""Attention on a mesh: kernels are not partitioned by XLA, so each device runs them on its own sequences and heads."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efflm import ops
from efflm.ops.attention import KERNELS, kernel_for
from efflm.ops.kernels import Attention
from efflm.parallel import sharding


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None = None,
    *,
    slots_BT: jax.Array | None = None,
    window: int,
    cap: float = 0.0,
) -> jax.Array:
    """ops.attention, where it may run a kernel inside a shard_map.

    The batch is spread over `data` and `fsdp`, heads over `tensor`, as far as these divide them, like the activations
    around; along other axes it is whole. What no kernel takes is left to XLA's partitioner.
    """

    def attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, slots_BT):
        segments = {"segments_BT": segments_BT, "key_segments_BS": key_segments_BS}
        return ops.attention(q_BTNH, k_BSKH, v_BSKH, slots_BT=slots_BT, window=window, cap=cap, **segments)

    arguments = (q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, slots_BT)
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name in mesh.axis_names if name not in mesh.manual_axes}
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    call = Attention(T, S, H, q_BTNH.dtype, window, slots_BT is None, key_segments_BS is None, cap)
    if math.prod(mesh.shape[name] for name in free) == 1 or not any(kernel_for(name, call) for name in KERNELS):
        return attend(*arguments)
    rows = tuple(name for name in sharding.BATCH[0] if name in free)
    rows = rows if B % math.prod(mesh.shape[name] for name in rows) == 0 else None
    # Key-value heads fewer than devices are repeated, so that each device has those that its query heads read.
    tensor = mesh.shape["tensor"]
    copies = tensor // math.gcd(K, tensor)
    heads = "tensor" if N % (K * copies) == 0 else None
    if heads:
        k_BSKH, v_BSKH = jnp.repeat(k_BSKH, copies, axis=2), jnp.repeat(v_BSKH, copies, axis=2)
    if slots_BT is not None:
        slots_BT = jnp.broadcast_to(slots_BT, (B, T))
    by_head, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(
        attend, in_specs=(*(by_head,) * 3, *(by_row,) * 3), out_specs=by_head, axis_names=free, check_vma=False
    )(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, slots_BT)
