"""Sampling against its definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.config import InputError
from efflm.infer.sampling import Sampling, ranked, sample

DRAWS = 4000
LOGITS = np.log([0.7, 0.2, 0.1])


def expected(logits, how):
    """What each token is drawn with, float64 [V], one filter after the other by its definition."""
    p = np.exp(np.float64(logits) / how.temperature - np.max(logits) / how.temperature)
    order = np.argsort(-p, kind="stable")
    p /= p.sum()
    if how.top_k:
        p[order[how.top_k :]] = 0
        p /= p.sum()
    if how.top_p < 1:
        mass, kept = 0.0, []
        for token in order:
            kept.append(token)
            mass += p[token]
            if mass >= how.top_p:
                break
        p[[token for token in order if token not in kept]] = 0
        p /= p.sum()
    p[p < how.min_p * p.max()] = 0
    return p / p.sum()


def distribution(logits, how):
    order, scores = ranked(jnp.asarray([logits], jnp.float32), how.arrays())
    out = np.zeros(len(logits))
    out[np.asarray(order)[0]] = jax.nn.softmax(scores[0])
    return out


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.013]),
    min_p=st.sampled_from([0.0, 0.03, 0.2, 1.0]),
)
def test_the_filters_leave_what_their_definitions_say(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).standard_normal(20).astype(np.float32) * 2
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(distribution(logits, how), expected(logits, how), atol=2e-6)


def test_the_order_of_the_filters_is_what_the_docstring_says():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    # Top-k first: of the two likeliest the first has 2/3 of the mass, so it alone reaches top_p.
    np.testing.assert_allclose(distribution(np.log(p), Sampling(temperature=1, top_k=2, top_p=0.6)), [1, 0, 0, 0])
    # The temperature before all: squared, the first has 0.725.
    np.testing.assert_allclose(distribution(np.log(p), Sampling(temperature=0.5, top_p=0.7)), [1, 0, 0, 0])


def test_of_equals_the_lower_ids_stay():
    kept = distribution(np.zeros(6), Sampling(temperature=1, top_k=4))
    np.testing.assert_allclose(kept, [0.25, 0.25, 0.25, 0.25, 0, 0])


def share(how, logits=LOGITS):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (DRAWS, 1))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.bincount(jax.jit(sample)(rows, how.arrays(), keys), minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("how", "p"),
    [
        (Sampling(), [1, 0, 0]),
        (Sampling(top_k=2, min_p=0.1), [1, 0, 0]),  # temperature 0, whatever else
        (Sampling(temperature=1.0), [0.7, 0.2, 0.1]),
        (Sampling(temperature=0.5), np.array([0.49, 0.04, 0.01]) / 0.54),
        (Sampling(temperature=1.0, top_k=2), [7 / 9, 2 / 9, 0]),
        (Sampling(temperature=1.0, min_p=0.2), [7 / 9, 2 / 9, 0]),
    ],
)
def test_what_is_drawn_follows_the_distribution(how, p):
    np.testing.assert_allclose(share(how), p, atol=0.03)
    turned = share(how, LOGITS[::-1])  # ids are not ranks
    np.testing.assert_allclose(turned, p[::-1], atol=0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_what_is_no_choice_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Sampling(**wrong)
