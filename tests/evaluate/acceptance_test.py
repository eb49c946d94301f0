import itertools

import numpy as np
import pytest
from scipy import stats

from efflm.evaluate import acceptance, quality
from efflm.evaluate.quality import Quality


def of(bits):
    bits = np.asarray(bits, float)
    return Quality(bits, *[np.full(len(bits), 100.0)] * 4)


def test_a_test_has_its_share_and_what_those_just_before_it_were_accepted_with():
    share = lambda j: acceptance.CHANCE / (j * (j + 1))
    for accepted in itertools.product((True, False), repeat=5):
        run = len(accepted) - max((j for j, each in enumerate(accepted, 1) if not each), default=0)
        by_hand = sum(share(j) for j in range(len(accepted) + 1 - run, len(accepted) + 2))
        assert acceptance.level(accepted) == pytest.approx(by_hand)
    assert sum(acceptance.level([False] * j) for j in range(1000)) < acceptance.CHANCE


def test_the_bound_is_student_s_and_infinite_for_one_document(rng):
    before, after = of(rng.normal(400, 60, 12)), of(rng.normal(408, 60, 12))
    value, error = quality.relative_increase(after, before)
    assert value == pytest.approx(after.bits.sum() / before.bits.sum() - 1)
    wanted = value + stats.t.ppf(0.99, 11) * error
    assert acceptance.bound((value, error), 12, 0.01) == pytest.approx(wanted)
    assert acceptance.bound(quality.relative_increase(of([2]), of([1])), 1, 0.01) == np.inf


def test_layers_are_fronts_without_the_fronts_before(rng):
    points = [tuple(each) for each in rng.integers(0, 6, (30, 2)).tolist()]
    found, left = acceptance.layers(points), dict(enumerate(points))
    for layer in range(1, max(found) + 1):
        beaten = lambda p, left=left: any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in left.values())
        front = {i for i, p in left.items() if not beaten(p)}
        assert front == {i for i, each in enumerate(found) if each == layer}
        left = {i: p for i, p in left.items() if i not in front}
    assert not left


def test_the_promising_are_those_that_two_errors_bring_within_what_is_allowed():
    increases = [(0.03, 0.011), (0.03, 0.005), (0.0, None), (0.005, 0.001), (0.004, 0.001)]
    costs = [1.0, 0.5, 3.0, 2.0, 2.5]
    assert acceptance.promising(costs, increases, 0.01) == [0, 3, 4, 2]  # all four on the front, by cost
    assert acceptance.promising([1.0, 0.5, 3.0, 2.0, 1.5], increases, 0.01) == [0, 4, 2, 3]  # 3 is beaten by 4
    assert acceptance.promising(costs, increases, np.inf, by_loss=True) == [2, 4, 3, 0, 1]


def test_how_often_resampled_documents_hold(rng):
    before, after = of(np.full(40, 100.0)), of(100 + rng.normal(2, 5, 40))
    exact = np.mean([(after.bits[d].sum() / 4000 - 1) <= 0.02 for d in rng.integers(0, 40, (4000, 40))])
    assert acceptance.held(after, before, 0.02, times=4000) == pytest.approx(exact, abs=0.04)
    assert acceptance.held(after, before, 1.0) == 1.0


def test_the_bound_of_a_share_is_exact():
    for count, items in ((0, 20), (3, 50), (50, 50)):
        wanted = 1.0 if count == items else stats.beta.ppf(0.98, count + 1, items - count)
        found = acceptance.share_bound(count, items, 0.02)
        assert found == pytest.approx(wanted)
        assert count == items or stats.binom.cdf(count, items, found) == pytest.approx(0.02)
