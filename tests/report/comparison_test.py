"""Which differences count, against figures worked out here and against chance."""

import math

import numpy as np
import pytest

from efflm.config import InputError
from efflm.evaluate import quality, throughput
from efflm.evaluate.quality import Quality
from efflm.evaluate.throughput import Rate
from efflm.report import comparison, page, rows, table, verdicts
from efflm.report.comparison import FIGURES, Comparison, Limits
from tests.report.example import ANSWERS, TEN, answered, asked, row

DENSE = row("dense", 16.0, 14000, 400, None)


def test_errors_are_corrected_for_the_number_of_comparisons():
    assert Comparison(TEN[:2]).count == 5
    assert Comparison(TEN[:2]).errors == pytest.approx(2.5758, abs=1e-4)  # 1% in both tails
    assert Comparison([*TEN, *TEN[:4]]).count == 455  # thirteen beside the first: 91 pairs in five figures
    assert Comparison([*TEN, *TEN[:4]]).errors == pytest.approx(3.868, abs=1e-3)


def test_what_differs_by_chance_alone_is_hardly_ever_called_better(rng):
    """Of 200 reports of eight models that are all alike, each with its own noise, at most 5% claim any difference."""
    claims = 0
    for _ in range(200):
        one = rng.normal(0, 1, (8, 2))
        rows = [
            row(
                str(i),
                4.0,
                14000,
                400,
                0.01 + 0.001 * x,
                0.001,
                kl_to_original=0.01 + 0.001 * y,
                kl_to_original_stderr=0.001,
            )
            for i, (x, y) in enumerate(one)
        ]
        compared = Comparison([DENSE, *rows], Limits(same=0.0))
        claims += any(compared.better(a, b, each) for a in rows for b in rows for each in FIGURES)
    assert claims <= 10


def of_documents(rng, kl, agreement, common):
    """Sums of 40 documents of 100 tokens, whose difficulty is `common`."""
    tokens = np.full(40, 100.0)
    bits = 100 * (3 + common + 0.001 * rng.standard_normal(40))
    divergence = 100 * kl * (1 + common / 2 + 0.001 * rng.standard_normal(40))
    return Quality(bits, tokens, tokens, divergence, 100 * (agreement + common / 50 + 1e-4 * rng.standard_normal(40)))


def test_errors_of_quality_are_paired_over_documents(rng):
    common = rng.standard_normal(40)
    found = {"a": of_documents(rng, 0.010, 0.90, common), "b": of_documents(rng, 0.011, 0.89, common)}
    rows = []
    for name, each in found.items():
        figures = {"kl_to_original": quality.divergence(each), "top1_agreement": quality.agreement(each)}
        fields = {
            f"{figure}{end}": value for figure, pair in figures.items() for end, value in zip(("", "_stderr"), pair)
        }
        rows.append(row(name, 4.0, 14000, 400, 0.0, **fields))
    apart, paired = Comparison([DENSE, *rows], Limits(same=0)), Comparison([DENSE, *rows], Limits(same=0), found)
    for figure in ("divergence", "agreement"):
        value, error = paired.ahead(*rows, figure)
        assert value == pytest.approx(apart.ahead(*rows, figure)[0])
        assert 0 < error < apart.ahead(*rows, figure)[1] / 5
        assert paired.better(*rows, figure)
        assert not apart.better(*rows, figure)
        assert paired.worse(*reversed(rows), figure)
    name = {"divergence": "kl", "agreement": "agreement"}
    for figure, sign in (("divergence", -1), ("agreement", 1)):
        each = sign * (getattr(found["a"], name[figure]) - getattr(found["b"], name[figure])) / 100
        expected = each.mean(), each.std(ddof=1) / math.sqrt(40)  # as many tokens in each document
        np.testing.assert_allclose(paired.ahead(*rows, figure), expected, rtol=1e-9)


def rate(*rounds):
    return Rate(*np.quantile(rounds, (0.5, 0.25, 0.75)), rounds)


def test_speeds_of_different_times_are_compared_through_the_first_model(tmp_path):
    """Two models of one speed, the second measured while the machine was half as fast: half the tokens a second,
    but not in what counts."""
    noise = 1 + 0.01 * np.array([1, -1, 2, -2, 0, 3, -3, 1, -1, 0, 2])
    calm, busy = (tuple(100 * speed * noise) for speed in (1.0, 0.5))
    times = {"dense": (calm, calm), "a": (tuple(200 * noise), calm), "b": (tuple(100 * noise[::-1]), busy)}
    rates = {name: tuple((rate(*each), rate(*each)) for each in pair) for name, pair in times.items()}
    rows = [DENSE]
    for name, (own, base) in list(rates.items())[1:]:
        ratio, error = throughput.ratio(own[0], base[0])
        assert ratio == pytest.approx(2.0, rel=0.02)
        fields = {f"{phase}_speedup{end}": x for phase in ("prefill", "decode") for end, x in
                  (("", ratio), ("_stderr", error))}  # fmt: skip
        made = row(name, 4.0 if name == "a" else 4.01, own[0].median, own[1].median, 0.0, **fields)
        rows.append(made.but(kl_to_original=0.0, top1_agreement=1.0))
    compared = Comparison(rows, Limits(), {}, rates)
    for pair in (rows[1:], rows[:0:-1]):
        assert not compared.better(*pair, "decode")
        assert compared.better(pair[0], DENSE, "decode")
    assert verdicts.negative(compared) == []
    best = verdicts.positive(compared)[0]
    assert "decode 2.0× as fast" in best.words.replace("2.00×", "2.0×")
    assert "As good at it" in best.words
    shown = page.Table(caption="", columns=table.COLUMNS, rows=rows)
    decode = next(column for column in table.COLUMNS if column.heading == "decode tok/s")
    cells = [shown.cell(decode, each) for each in rows]
    assert [cell.ratio[0] for cell in cells] == ["1", "2", "2"]
    assert float(cells[1].sort) == pytest.approx(float(cells[2].sort), rel=0.05)  # not the tokens of another time
    assert "each beside the first" in comparison.protocol(compared)


def test_the_ratio_of_the_same_rounds_has_the_noise_of_their_ratios(rng):
    errors, found = [], []
    for _ in range(300):
        load = rng.uniform(0.3, 1.0, 11)  # of the machine, the same for both
        pair = 200 * load * rng.normal(1, 0.02, 11), 100 * load * rng.normal(1, 0.02, 11)
        ratio, error = throughput.ratio(*(rate(*each) for each in pair))
        found.append(ratio)
        errors.append(error)
    assert np.mean(found) == pytest.approx(2.0, rel=0.005)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.2)
    assert throughput.ratio(rate(3.0), rate(2.0)) == (1.5, None)


@pytest.mark.parametrize("rounds", [5, 11])
def test_few_rounds_of_equal_speeds_are_not_told_apart(rounds, rng):
    """Errors from few rounds are often too small: the normal distribution's quantile names one of these pairs in ten
    (5 rounds) or in a hundred."""
    rows = [DENSE, row("a", 4.0, 100, 100, 0.0), row("b", 4.0, 100, 100, 0.0), *(TEN * 2)[:10]]
    wrong = 0
    for _ in range(500):
        speeds = {name: rate(*(100 * rng.normal(1, 0.05, rounds))) for name in ("dense", "a", "b")}
        base = (speeds["dense"],) * 2
        compared = Comparison(rows, Limits(), {}, {name: ((own, own), base) for name, own in speeds.items()})
        wrong += compared.better(rows[1], rows[2], "prefill") or compared.better(rows[2], rows[1], "prefill")
    assert wrong <= 1


def test_limits_that_contradict_are_refused():
    for given, words in (({"loss": -1.0}, "loss is -1.0, but"), ({"same": 0.1}, "same is 0.1, but must not be above")):
        with pytest.raises(InputError, match=words):
            Limits(**given)


def test_tasks_are_compared_over_the_items_both_answer():
    rows = asked(row("float32", 16.0, 14000, 400, None), *(row(name, 4.0, 1, 1, 0.0) for name in ("flips", "loses")))
    paired, apart = Comparison(rows, Limits(), {}, {}, ANSWERS), Comparison(rows)
    assert paired.count == 3 * 7
    assert paired.figures[-2:] == ("accuracy on arc", "answers to arc")
    for compared, error in ((paired, 0.01453), (apart, 0.01927)):
        assert compared.ahead(rows[1], rows[2], "accuracy on arc") == pytest.approx((0.12, error), abs=1e-4)
        assert compared.better(rows[1], rows[2], "accuracy on arc")
        assert compared.better(rows[0], rows[1], "answers to arc")
        assert not compared.better(rows[0], rows[1], "accuracy on arc")
        assert compared.worse(rows[2], rows[1], "answers to arc")
        assert "p < 0.0024" in comparison.protocol(compared)
    assert "beyond what float rounding alone" in comparison.protocol(paired)
    assert Comparison([rows[0], rows[1].but(tasks={})]).figures == FIGURES  # nothing to compare with


def test_few_flips_are_not_told_apart_from_chance():
    """Seven flips to one side have p = 0.016, beyond two standard errors, but not beyond the 5% of 14 comparisons."""
    chosen = [1] * 7 + [0] * 293 + [1] * 200
    known = ANSWERS | {"flips": {"arc": answered(chosen)}}
    first = row("float32", 16.0, 14000, 400, None)
    pair = [each.but(tasks=rows.tasks(known, each.name, "float32")) for each in (first, row("flips", 4.0, 1, 1, 0.0))]
    compared = Comparison(pair, Limits(), {}, {}, known)
    value, error = compared.ahead(*pair, "accuracy on arc")
    assert value > 2.6 * error
    assert not compared.better(*pair, "accuracy on arc")
    assert compared.worse(*pair[::-1], "accuracy on arc")
