import jax
import jax.numpy as jnp
import numpy as np

from efflm.precision import LossScale, stochastic_round


def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_the_mean(rng):
    x = jnp.asarray(rng.standard_normal(50) * 10.0 ** rng.integers(-6, 6, 50), jnp.float32)
    many = jnp.tile(x[:, None], (1, 4000))
    rounded = np.float64(stochastic_round(many, jnp.bfloat16, jax.random.key(0)))
    exact = np.float64(x)[:, None]
    gap = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)  # between neighbours: bfloat16 has 8 bits of significand
    assert np.all(np.abs(rounded - exact) < gap)
    assert np.all(rounded == np.float64(jnp.asarray(rounded).astype(jnp.bfloat16)))
    np.testing.assert_allclose(rounded.mean(1), exact[:, 0], atol=0, rtol=2**-7 * 5 / 4000**0.5)


def test_stochastic_rounding_keeps_what_bfloat16_can_hold():
    x = jnp.asarray([0.0, -0.0, 1.0, -3.5, np.inf, -np.inf, np.nan], jnp.float32)
    for seed in range(20):
        rounded = stochastic_round(x, jnp.bfloat16, jax.random.key(seed))
        np.testing.assert_array_equal(np.float32(rounded), x)
    exact = jnp.asarray([0.1, -1e-30, 3.3e38, np.nan], jnp.float32)
    same = stochastic_round(exact, jnp.float32, jax.random.key(0))
    assert same.dtype == jnp.float32
    np.testing.assert_array_equal(same, exact)  # already what is asked for: nothing is rounded


def test_small_updates_are_lost_without_it():
    def walk(round_):
        w = jnp.ones(1000, jnp.bfloat16)
        for i in range(100):
            w = round_(w.astype(jnp.float32) + 1e-4, jax.random.key(i))
        return np.float64(w).mean()

    assert walk(lambda x, rng: x.astype(jnp.bfloat16)) == 1.0  # half the last place of 1 is 0.0039
    np.testing.assert_allclose(walk(lambda x, rng: stochastic_round(x, jnp.bfloat16, rng)), 1.01, atol=1e-3)


def test_the_scale_stays_within_its_bounds():
    scale = LossScale.start(2.0, interval=1)
    for _ in range(3):
        scale = scale.after(jnp.asarray(False))
    assert scale.scale == 1.0
    for _ in range(30):
        scale = scale.after(jnp.asarray(True))
    assert scale.scale == 2.0**24
