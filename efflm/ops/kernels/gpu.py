"""Attention on NVIDIA GPUs: JAX's Pallas kernel of FlashAttention, which Triton compiles, forward and backward.

Why this one. cuDNN's kernels are out of reach of ahead-of-time compiling: JAX asks for the installed cuDNN and for the
attached GPU while tracing, and offers no segments. tokamax asks for the attached device too, and its backward pass
wants documents as a T x T mask. jax.experimental.pallas.ops.gpu.attention knows segments and asks for nothing (JAX
0.11 needs to be told the kind of GPU where none is attached: jax.sharding.AbstractDevice).
"""

import warnings

import jax
import jax.numpy as jnp

from efflm.ops.kernels import Attention

BLOCK = 128  # queries and keys in a block


def block(length: int) -> int:
    """The size of the blocks that `length` queries or keys are cut into; 0: they cannot be."""
    return BLOCK if length % BLOCK == 0 else 0


def takes(call: Attention) -> bool:
    """Whether the kernel can compute this attention. It knows no slots and no window.

    float16 is for GPUs older than Ampere, for which Triton does not compile; float32 would be rounded to
    TensorFloat-32.
    """
    shapes = call.queries == call.keys and block(call.queries) > 0 and call.head_dim % 8 == 0
    own = call.in_order and call.own_segments and not call.window
    return shapes and 32 <= call.head_dim <= 128 and own and jnp.dtype(call.dtype) == jnp.bfloat16


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """ops.attention of T queries on their own T keys -> float32 [B, T, N, H]. interpret: on any platform."""
    # Imported where it is traced: Pallas takes half a second that most programs need not spend.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.11 recommends tokamax; see above
        from jax.experimental.pallas.ops.gpu.attention import mha

    N, H = q_BTNH.shape[2:]
    group = N // k_BSKH.shape[2]  # the kernel knows no groups: keys and values are repeated for each query head
    k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    out_BTNH = mha(q_BTNH, k_BSNH, v_BSNH, segments_BT, sm_scale=H**-0.5, causal=True, interpret=interpret)
    return out_BTNH.astype(jnp.float32)
