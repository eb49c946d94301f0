import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_float64_loops(rng, heads, kv_heads):
    B, T, S, H = 2, 3, 5, 8
    q, k, v = (rng.standard_normal((B, n, h, H)) for n, h in ((T, heads), (S, kv_heads), (S, kv_heads)))
    mask = rng.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    out = np.zeros((B, T, heads, H))
    for b, t, n in np.ndindex(B, T, heads):
        shared = n // (heads // kv_heads)
        scores = k[b, :, shared] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max()) * mask[b, t]
        out[b, t, n] = weights / weights.sum() @ v[b, :, shared]
    got = ops.attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(mask))
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-5)
