import hypothesis.extra.numpy as arrays
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from efflm.train import losses

LOGITS = arrays.arrays(np.float32, (2, 3, 5), elements=st.floats(-30, 30, width=32))


def log_softmax(x):
    x = np.float64(x)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


@given(LOGITS)
def test_nll_equals_float64(logits):
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.next_token_nll(jnp.asarray(logits), targets), expected, rtol=1e-4, atol=1e-4)


@given(LOGITS, LOGITS)
def test_divergence_equals_float64_and_is_zero_of_itself(p, q):
    log_p, log_q = log_softmax(p), log_softmax(q)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(losses.kl_divergence(p, q), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(losses.kl_divergence(p, p), 0.0)
    assert np.all(np.asarray(losses.kl_divergence(p, q)) > -1e-4)


def test_an_empty_batch_has_loss_zero():
    assert losses.weighted_mean(jnp.ones((2, 2)), jnp.zeros((2, 2))) == 0
