import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.evaluate import quality, windows
from efflm.evaluate.windows import Scoring
from tests import tiny


def test_it_is_the_gap_in_each_bin():
    sure = np.array([0.9, 0.91, 0.2, 0.25, 0.5])
    correct = np.array([True, False, False, True, True])
    gaps = abs(0.5 - 0.905) * 2 + abs(0.0 - 0.2) + abs(1 - 0.25) + abs(1 - 0.5)  # 0.2 and 0.25 are in two bins of 15
    assert quality.expected_error(sure, correct) == pytest.approx(gaps / 5)
    assert quality.expected_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert np.isnan(quality.expected_error(np.array([0.5, np.nan]), np.array([True, False])))


def test_a_model_that_draws_as_it_says_has_a_small_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), 40_000)
    drawn = np.array([rng.choice(6, p=row) for row in p[:8000]])
    assert quality.expected_error(p[:8000].max(-1), p[:8000].argmax(-1) == drawn) < 0.02
    assert quality.expected_error(np.sqrt(p[:8000].max(-1)), p[:8000].argmax(-1) == drawn) > 0.1


def test_over_a_text_it_is_that_of_all_its_tokens():
    model = tiny.model()
    ids = [tiny.tokens(model.config, 1, 30, seed=i)[0].tolist() for i in range(3)]
    score = Scoring(tokens=0, window=32).within(model.config.max_length)
    got = quality.calibration_error(model, windows.blocks(([(i, 1) for i in each] for each in ids), 0, score))
    sure, correct = [], []
    for each in ids:
        p = jax.nn.softmax(tiny.logits(model, jnp.asarray([[0, *each[:-1]]]))[0])
        sure += p.max(-1).tolist()
        correct += (p.argmax(-1) == np.array(each)).tolist()
    assert got == pytest.approx(quality.expected_error(np.array(sure), np.array(correct)), abs=1e-5)
