"""Attention on TPUs: JAX's splash attention, a Pallas kernel of FlashAttention that skips masked blocks.

jax.experimental.pallas.ops.tpu.splash_attention knows causal and local masks, segments and grouped heads, and its
backward pass is a kernel too. It holds no scores: blocks that the mask hides wholly are not computed (those that only
segments hide are).
"""

import jax
import jax.numpy as jnp

from efflm.ops.kernels import Attention

BLOCKS = (512, 256, 128)  # queries or keys in a block: the largest that divides them; 128 is a row of vector lanes


def block(length: int) -> int:
    """The size of the blocks that `length` queries or keys are cut into; 0: they cannot be."""
    return next((size for size in BLOCKS if length % size == 0), 0)


def takes(call: Attention) -> bool:
    """Whether the kernel can compute this attention. It knows no slots."""
    dtypes = (jnp.bfloat16, jnp.float32)  # Mosaic has no float16
    shapes = block(call.queries) > 0 and block(call.keys) > 0 and call.head_dim % 8 == 0
    return shapes and call.in_order and jnp.dtype(call.dtype) in dtypes


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """ops.attention of queries that are the last of the keys -> float32 [B, T, N, H]; `interpret` on any platform."""
    # Imported where it is traced: Pallas takes half a second that most programs need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    shape, offset = (T, S), S - T
    mask = masks.LocalMask(shape, (window - 1, 0), offset) if window else masks.CausalMask(shape, offset)
    q_size, k_size = block(T), block(S)
    sizes = splash.BlockSizes(
        block_q=q_size, block_kv=k_size, block_q_dkv=q_size, block_kv_dkv=k_size, block_q_dq=q_size, block_kv_dq=k_size
    )
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // K)), block_sizes=sizes, interpret=interpret
    )
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, key_segments_BS)
    # The kernel does not scale. Rounded once, together with the conversion.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    of_sequence = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out_BKGTH = jax.vmap(of_sequence)(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(jnp.float32)
