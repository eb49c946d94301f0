import json
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from efflm.evaluate import answers, quality
from tests.report.example import answered


def test_a_published_example_of_pairs():
    """Response before and after consolidation therapy (Cavo 2012), 161 patients, as Fagerland, Lydersen and Laake,
    Statistical Analysis of Contingency Tables (2017), chapter 8, and their R package contingencytables have it."""
    value, error = answers.difference(16, 6, 161)
    assert value == pytest.approx(-0.0621, abs=5e-5)
    assert (value - 1.96 * error, value + 1.96 * error) == pytest.approx((-0.1184, -0.0058), abs=5e-5)
    assert answers.interval(16, 6, 161) == pytest.approx((-0.1195, -0.0032), abs=5e-5)
    assert answers.mcnemar(16, 6) == pytest.approx(0.052479, abs=5e-7)


def test_mcnemar_is_the_binomial_test_of_the_flips():
    for one in range(12):
        for other in range(12):
            expected = stats.binomtest(one, one + other).pvalue if one + other else 1.0
            assert answers.mcnemar(one, other) == pytest.approx(expected, abs=1e-12)
    assert 0 <= answers.mcnemar(30_000, 29_000) < 1e-4


@pytest.mark.parametrize(("items", "to_wrong", "to_right"), [(50, 0.1, 0.1), (100, 0.05, 0.01), (500, 0.1, 0.06)])
def test_intervals_hold_the_true_difference_in_95_of_100(items, to_wrong, to_right, rng):
    drawn = rng.multinomial(items, (to_wrong, to_right, 1 - to_wrong - to_right), 2000)
    found = np.array([answers.interval(*map(int, each[:2]), items) for each in drawn])
    held = np.mean((found[:, 0] <= to_right - to_wrong) & (to_right - to_wrong <= found[:, 1]))
    assert 0.94 <= held <= 0.98
    low, high = answers.interval(0, 0, items)
    assert -low == high > 1.96 / items  # of no flips too


def test_the_detectable_difference_is_found_in_80_of_100(rng):
    items, flipped = 500, (40, 20)
    effect, share = answers.detectable(*flipped, items), 62 / 502
    both = ((share + effect) / 2, (share - effect) / 2)
    one, other, _ = rng.multinomial(items, (*both, 1 - share), 20_000).T
    assert np.mean(np.abs(one - other) > 1.96 * np.sqrt(one + other)) == pytest.approx(0.8, abs=0.01)
    assert answers.detectable(0, 0, 10) <= 2 / 12  # no more than flips at all
    assert answers.detectable(*flipped, 5000) < effect


def of(loglikelihoods, lengths, labels, kind="choices"):
    table = np.array(loglikelihoods, float)
    tokens = np.full(table.shape, 2)
    return answers.Answers(
        kind, table, tokens, np.array(lengths), table > -1, np.zeros(len(table)), np.ones(1), np.ones(1, bool),
        np.array(labels),
    )  # fmt: skip


def test_longer_choices_are_less_likely_but_not_by_their_bytes():
    given = of([[-4, -6, -np.inf], [-3, -3, -2]], [[4, 12, 0], [1, 1, 1]], [1, 0])
    assert answers.chosen(given, "plain").tolist() == answers.chosen(given, "tokens").tolist() == [0, 2]
    assert answers.chosen(given, "bytes").tolist() == [1, 2]
    assert answers.usual(given) == "bytes"
    assert answers.correct(given, "bytes").tolist() == [True, False]
    letters = of([[-1, -1]], [[1, 3]], [0])
    letters.tokens[:] = 1
    assert answers.usual(letters) == "plain"
    assert answers.chosen(letters, "plain").tolist() == [0]  # the first of equals
    broken = of([[math.nan, -1.0], [-np.inf, -np.inf]], [[1, 1], [1, 1]], [0, 0])
    assert answers.chosen(broken, "plain").tolist() == [-1, -1]


def test_a_last_word_is_right_if_every_token_is_the_likeliest():
    given = of([[-0.5], [-3.0], [-0.1]], [[4], [4], [4]], [0, 0, 0], "last word")
    assert answers.usual(given) == "plain"
    assert answers.correct(given, "plain").tolist() == [True, False, True]
    value, error = answers.mean(answers.correct(given, "plain"))
    assert (value, error) == pytest.approx((2 / 3, statistics.stdev([1, 0, 1]) / math.sqrt(3)))
    assert answers.mean(np.array([True])) == (1.0, None)


def test_the_figures_of_a_row():
    """Ten items: of the first model the first six are right; the other one loses two of them, gains one, and gives one
    other wrong answer."""
    first = answered([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    other = answered([1, 2, 0, 0, 0, 0, 0, 2, 1, 1], kl=0.25)
    found = answers.figures(other, first, rounded=answered([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], kl=0.125))
    assert (found["flips_to_wrong"], found["flips_to_right"], found["changed"]) == (2, 1, 4)
    assert (found["accuracy"], found["accuracy_difference"]) == pytest.approx((0.5, -0.1))
    assert found["accuracy_difference_stderr"] == pytest.approx(math.sqrt((0.3 - 0.01) / 10))
    assert (found["kl"], found["changed_by_rounding"], found["kl_by_rounding"]) == (0.25, 1, 0.125)
    assert (found["mcnemar_p"], found["items"], found["by"]) == (1.0, 10, "bytes")
    assert found["calibration_error"] == pytest.approx(quality.expected_error(other.confidence, other.right))
    assert json.loads(json.dumps(found))["interval"] == pytest.approx(answers.interval(2, 1, 10))
    alone = answers.figures(first, first)
    assert alone.keys() == found.keys()
    assert {alone[name] for name in ("changed", "mcnemar_p", "interval", "kl", "changed_by_rounding")} == {None}
    assert (alone["accuracy"], alone["calibration_error"]) == (0.6, alone["calibration_error_before"])
