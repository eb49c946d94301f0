import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.report import numbers


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (2.19741, 0.07123, "2.197 ± 0.071"),
        (12.1403, 1.018, "12.1 ± 1.0"),
        (1626.157, 223.702, "1,630 ± 220"),
        (-0.0000021, 0.0000033, "0.00000 ± <0.00001"),
        (0.0, 0.0, "0 exactly"),
        (0.5, None, "0.5000"),
        (float("inf"), float("nan"), "inf"),
        (float("nan"), float("nan"), "nan"),
        (3.0, float("inf"), "3.0000"),
        (1.234e45, 1e43, "1.23e+45 ± 1.00e+43"),
    ],
)
def test_a_figure_has_the_digits_that_its_error_allows(value, error, shown):
    assert " ".join(filter(None, numbers.with_error(value, error))) == shown


@given(st.floats(-1e4, 1e4), st.floats(0, 1e3), st.booleans())
def test_a_figure_is_rounded_by_less_than_its_error_and_zero_has_no_sign(value, error, sign):
    text, beside = numbers.with_error(value, error, sign=sign)
    assert abs(float(text.replace(",", "")) - value) <= max(error / 15, 6e-6)
    assert float(text.replace(",", "")) != 0 or text[0] == "0"
    assert beside.startswith("± ") or (value == error == 0 and beside == "exactly")
    assert (text[0] == "+") == (sign and float(text.replace(",", "")) > 0)


def test_ranges_end_where_they_differ():
    assert numbers.with_range(14012.3, (13100.4, 15232.9)) == ("14,000", "(13,000–15,000)")
    assert numbers.with_range(1400.2, (1390.1, 1412.3)) == ("1,400", "(1,390–1,410)")
    assert numbers.with_range(3.123, (3.0, 3.21)) == ("3.1", "(3.0–3.2)")


def test_ratios_have_no_more_digits_than_their_spread():
    assert numbers.ratio(3.927) == "3.93×"
    assert numbers.ratio(1.0712, 0.08) == "1.07×"
    assert numbers.ratio(1.94, 0.3) == "1.9×"
    assert numbers.ratio(34.56, 0.1) == "35×"


def test_a_perplexity_beyond_all_numbers_is_said_to_be_that():
    assert numbers.perplexity(float("inf"), None) == ("> 1e308", "")
    assert numbers.perplexity(12.1403, 1.018) == ("12.1", "± 1.0")


def test_shares_are_in_percent():
    assert numbers.percent(0.99512, 0.00123) == ("99.51%", "± 0.12%")
    assert numbers.percent(0.5, None) == ("50.0%", "")
