import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (3, 0.0), (3, 0.7)])
def test_the_weights_of_attention_give_what_attention_gives(window, cap):
    B, T, N, K, H = 2, 12, 4, 2, 8
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], 4, axis=1).astype(np.int32)
    order = jnp.arange(T)
    how = {"window": window, "cap": cap}
    p_BNTS = ops.attention_probabilities(
        q, k, slots_T=order, key_slots_S=order, segments_BT=segments, key_segments_BS=segments, **how
    )
    got = np.einsum("bnts,bsnh->btnh", np.float64(p_BNTS), np.repeat(v, N // K, axis=2).astype(np.float64))
    want = ops.attention(q, k, v, segments_BT=segments, **how)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(p_BNTS.sum(-1), 1, rtol=1e-5)
    seen = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((T, T), bool))
    assert not np.any(np.asarray(p_BNTS)[~np.broadcast_to(seen[:, None], p_BNTS.shape)])


def test_keys_in_another_order_have_the_same_weights():
    rng, order = np.random.default_rng(1), np.random.default_rng(2).permutation(6)
    q, k = (rng.standard_normal((1, 6, 2, 4)).astype(np.float32) for _ in range(2))
    slots = jnp.arange(6)
    plain = jax.jit(ops.attention_probabilities)(q, k, slots_T=slots, key_slots_S=slots)
    moved = jax.jit(ops.attention_probabilities)(q, k[:, order], slots_T=slots, key_slots_S=slots[order])
    np.testing.assert_allclose(moved, plain[..., order], rtol=1e-6)
